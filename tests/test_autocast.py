"""Autocast casts what PyTorch casts for its convolutions."""

import pytest
import torch
from shapes import Case

from dsconv_cuda import depthwise_separable_conv2d, reference

pytestmark = [pytest.mark.usefixtures("isa"), pytest.mark.one_isa]


def _pair(tensors, **kwargs):
    return depthwise_separable_conv2d(*tensors, **kwargs), reference.depthwise_separable_conv2d(*tensors, **kwargs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_of_the_region(dtype, device):
    tensors = Case().tensors(torch.float32, device)
    with torch.autocast(device.type, dtype):
        y, expected = _pair(tensors)
    assert y.dtype == expected.dtype == dtype
    cast = [t.to(dtype) for t in tensors]
    assert torch.equal(y, depthwise_separable_conv2d(*cast))


@pytest.mark.parametrize("other", [torch.float16, torch.bfloat16])
def test_mixed_low_precision_operands_are_cast(other, device):
    x, *weights = Case().tensors(torch.float32, device)
    with torch.autocast(device.type, torch.bfloat16):
        y, expected = _pair([x.to(other), *weights])
    assert y.dtype == expected.dtype == torch.bfloat16


def test_float64_stays(device):
    tensors = Case().tensors(torch.float64, device)
    with torch.autocast(device.type, torch.bfloat16):
        y, expected = _pair(tensors)
    assert y.dtype == expected.dtype == torch.float64
    assert torch.equal(y, depthwise_separable_conv2d(*tensors))


def test_float64_beside_float32_raises_as_in_pytorch(device):
    x, *weights = Case().tensors(torch.float32, device)
    with torch.autocast(device.type, torch.bfloat16):
        with pytest.raises(TypeError, match="dtype"):
            depthwise_separable_conv2d(x.double(), *weights)
        with pytest.raises(RuntimeError):
            reference.depthwise_separable_conv2d(x.double(), *weights)


def test_disabled_region_inside(device):
    tensors = Case().tensors(torch.float32, device)
    with torch.autocast(device.type, torch.bfloat16), torch.autocast(device.type, enabled=False):
        assert depthwise_separable_conv2d(*tensors).dtype == torch.float32


@pytest.mark.parametrize("out_activation", ["identity", "tanh", "silu"])
def test_gradients_come_back_in_the_parameters_dtype(out_activation, device):
    tensors = Case().tensors(torch.float32, device, requires_grad=True)
    with torch.autocast(device.type, torch.bfloat16):
        y = depthwise_separable_conv2d(*tensors, out_activation=out_activation)
    dy = torch.randn_like(y)
    grads = torch.autograd.grad(y, tensors, dy)
    assert all(g.dtype == torch.float32 for g in grads)
    cast = [t.detach().bfloat16().requires_grad_() for t in tensors]
    expected = torch.autograd.grad(depthwise_separable_conv2d(*cast, out_activation=out_activation), cast, dy)
    assert all(torch.equal(g, e.float()) for g, e in zip(grads, expected, strict=True))


def test_second_derivatives_ignore_the_region_they_are_taken_in(device):
    """The graph of a float32 call keeps its dtype when its derivatives are taken inside of a region."""
    tensors = Case(activation="silu").tensors(torch.float32, device, requires_grad=True)
    y = depthwise_separable_conv2d(*tensors, activation="silu", out_activation="tanh")

    def second():
        (first,) = torch.autograd.grad(y.square().sum(), tensors[0], create_graph=True, retain_graph=True)
        return torch.autograd.grad(first.square().sum(), tensors[1], retain_graph=True)[0]

    outside = second()
    with torch.autocast(device.type, torch.bfloat16):
        inside = second()
    torch.testing.assert_close(inside, outside)


def test_module_under_autocast(device):
    from dsconv_cuda import DepthwiseSeparableConv2d

    module = DepthwiseSeparableConv2d(4, 8, 3, bias=True).to(device)
    with torch.autocast(device.type, torch.bfloat16):
        y = module(torch.randn(1, 4, 8, 8, device=device))
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert module.depthwise.weight.grad.dtype == torch.float32
