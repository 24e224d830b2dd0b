"""Memory formats: read as they lie, written as PyTorch's two convolutions write them."""

import itertools

import pytest
import torch
from oracle import check
from shapes import Case, identify

from dsconv_cuda import depthwise_separable_conv2d, reference

pytestmark = pytest.mark.usefixtures("isa")

FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
SHAPES = [
    Case(n=2, c=8, c_out=16, h=6, w=6),
    Case(n=1, c=8, c_out=16, h=6, w=6),
    Case(n=2, c=1, c_out=16, h=6, w=6),
    Case(n=2, c=8, c_out=1, h=6, w=6),
    Case(n=2, c=8, c_out=16, h=1, w=1),
    Case(n=2, c=8, c_out=16, h=1, w=6),
    Case(n=2, c=8, c_out=16, h=3, w=3, padding=(0, 0)),
    Case(n=2, c=8, c_out=16, h=6, w=6, kernel=(1, 1), padding=(0, 0)),
    Case(n=2, c=8, c_out=16, h=6, w=6, stride=(2, 2)),
    Case(n=0, c=8, c_out=16, h=6, w=6),
]


def _memory_format(t: torch.Tensor) -> str:
    """Both where one stands for the other."""
    names = [name for name, memory_format in FORMATS.items() if t.is_contiguous(memory_format=memory_format)]
    return "+".join(names)


@pytest.mark.parametrize("formats", list(itertools.product(FORMATS, repeat=3)), ids=",".join)
@pytest.mark.parametrize("case", SHAPES, ids=identify)
def test_output_format_is_pytorchs(case, formats, device):
    """For every combination of formats of input, dw_weight and pw_weight."""
    tensors = case.tensors(torch.float32, device)
    for i, name in enumerate(formats):
        tensors[i] = tensors[i].contiguous(memory_format=FORMATS[name])
    y = depthwise_separable_conv2d(*tensors, **case.kwargs)
    expected = reference.depthwise_separable_conv2d(*tensors, **case.kwargs)
    assert _memory_format(y) == _memory_format(expected)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("input_format", list(FORMATS))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=identify)
def test_every_dtype_keeps_the_inputs_format(input_format, dtype, device):
    """PyTorch itself keeps channels_last only for some dtypes, devices and builds; here one rule holds for all."""
    case = SHAPES[0]
    x, *weights = case.tensors(dtype, device)
    y = depthwise_separable_conv2d(x.contiguous(memory_format=FORMATS[input_format]), *weights, **case.kwargs)
    assert _memory_format(y) == input_format


@pytest.mark.parametrize("input_format", list(FORMATS))
@pytest.mark.parametrize("dy_format", list(FORMATS))
def test_gradient_of_the_input_has_the_inputs_format(input_format, dy_format, device):
    x, *weights = SHAPES[0].tensors(torch.float32, device)
    x = x.contiguous(memory_format=FORMATS[input_format]).requires_grad_()
    y = depthwise_separable_conv2d(x, *weights, **SHAPES[0].kwargs)
    y.backward(torch.randn_like(y).contiguous(memory_format=FORMATS[dy_format]))
    assert _memory_format(x.grad) == input_format


def _nhwc(t: torch.Tensor) -> torch.Tensor:
    """A tensor laid out as [N, H, W, C], seen as [N, C, H, W]."""
    return t.permute(0, 3, 1, 2)


VIEWS = {
    "slice of columns": lambda c: torch.randn(c.n, c.c, c.h, c.w + 5)[..., 3 : c.w + 3],
    "every other column": lambda c: torch.randn(c.n, c.c, c.h, 2 * c.w)[..., ::2],
    "slice of rows": lambda c: torch.randn(c.n, c.c, c.h + 4, c.w)[:, :, 1 : c.h + 1],
    "every other row": lambda c: torch.randn(c.n, c.c, 2 * c.h, c.w)[:, :, ::2],
    "slice of channels": lambda c: torch.randn(c.n, c.c + 3, c.h, c.w)[:, 2 : c.c + 2],
    "slice of channels, channels_last": lambda c: _nhwc(torch.randn(c.n, c.h, c.w, c.c + 3)[..., 1 : c.c + 1]),
    "every other channel, channels_last": lambda c: _nhwc(torch.randn(c.n, c.h, c.w, 2 * c.c)[..., ::2]),
    "slice of columns, channels_last": lambda c: _nhwc(torch.randn(c.n, c.h, c.w + 3, c.c)[:, :, 2 : c.w + 2]),
    "odd offset": lambda c: torch.randn(c.n * c.c * c.h * c.w + 1)[1:].view(c.n, c.c, c.h, c.w),
    "odd offset, channels_last": lambda c: _nhwc(torch.randn(c.n * c.c * c.h * c.w + 3)[3:].view(c.n, c.h, c.w, c.c)),
    "transposed": lambda c: torch.randn(c.n, c.c, c.w, c.h).transpose(2, 3),
    "batch innermost": lambda c: torch.randn(c.c, c.h, c.w, c.n).permute(3, 0, 1, 2),
    "channels between": lambda c: torch.randn(c.n, c.h, c.c, c.w).permute(0, 2, 1, 3),
    "expanded image": lambda c: torch.randn(1, c.c, c.h, c.w).expand(c.n, -1, -1, -1),
    "expanded channel": lambda c: torch.randn(c.n, 1, c.h, c.w).expand(-1, c.c, -1, -1),
    "expanded row": lambda c: torch.randn(c.n, c.c, 1, c.w).expand(-1, -1, c.h, -1),
    "expanded column": lambda c: torch.randn(c.n, c.c, c.h, 1).expand(-1, -1, -1, c.w),
    "one value": lambda c: torch.randn(1, 1, 1, 1).expand(c.n, c.c, c.h, c.w),
}


def _to_device(view: torch.Tensor, device) -> torch.Tensor:
    """With its storage, strides and offset."""
    storage = torch.empty(0).set_(view.untyped_storage()).to(device)
    return storage.as_strided(view.shape, view.stride(), view.storage_offset())


@pytest.mark.parametrize("view", list(VIEWS))
@pytest.mark.parametrize("case", [Case(c=9, h=9, w=10), Case(c=16, c_out=32, h=8, w=8, stride=(2, 2))], ids=identify)
def test_inputs_are_read_as_they_lie(view, case, device):
    x = _to_device(VIEWS[view](case), device)
    _, *others = case.tensors(torch.float32, device)
    check([x, *others], case.kwargs, backward=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=identify)
@pytest.mark.parametrize("view", ["slice of columns", "odd offset", "odd offset, channels_last", "transposed"])
def test_views_in_other_dtypes(view, dtype, device):
    case = Case(c=9, h=9, w=10)
    x = VIEWS[view](case)
    low = torch.empty_strided(x.shape, x.stride(), dtype=dtype, device=device).copy_(x)
    _, *others = case.tensors(dtype, device)
    check([low, *others], case.kwargs, backward=True)


def test_weights_and_biases_that_are_not_contiguous(device):
    x, dw_weight, pw_weight, dw_bias, pw_bias = Case().tensors(torch.float32, device)
    strided = [
        x,
        dw_weight.transpose(2, 3).contiguous().transpose(2, 3),
        pw_weight[:, :, 0, 0].t().contiguous().t()[:, :, None, None],
        torch.stack([dw_bias, dw_bias], 1)[:, 0],
        torch.stack([pw_bias, pw_bias], 1)[:, 0],
    ]
    check(strided, {}, backward=True)
    check([*strided[:3], dw_bias[:1].expand_as(dw_bias), pw_bias[:1].expand_as(pw_bias)], {}, backward=True)


@pytest.mark.parametrize("out_activation", ["identity", "silu"])
def test_unbatched(out_activation, device):
    case = Case(n=1, out_activation=out_activation)
    x, *weights = case.tensors(torch.float32, device)
    results = check([x[0], *weights], case.kwargs, backward=True)
    assert torch.equal(results["y"], depthwise_separable_conv2d(x, *weights, **case.kwargs)[0])


def test_pointwise_weight_in_two_dimensions(device):
    x, dw_weight, pw_weight, *biases = Case().tensors(torch.float32, device)
    results = check([x, dw_weight, pw_weight.flatten(1), *biases], {}, backward=True)
    assert results["grad pw_weight"].shape == pw_weight.shape[:2]
    assert torch.equal(results["y"], depthwise_separable_conv2d(x, dw_weight, pw_weight, *biases))


@pytest.mark.parametrize("out_activation", ["identity", "tanh", "silu"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_empty_batch(channels_last, out_activation, device):
    case = Case(n=0, out_activation=out_activation)
    tensors = case.tensors(torch.float32, device, channels_last, requires_grad=True)
    y = depthwise_separable_conv2d(*tensors, **case.kwargs)
    assert y.shape == (0, 7, 7, 11)
    y.sum().backward()
    for t in tensors:
        assert torch.equal(t.grad, torch.zeros_like(t))


def test_negative_bit_and_conjugate_views(device):
    """Views that PyTorch resolves lazily reach the kernels resolved."""
    case = Case()
    _, *weights = case.tensors(torch.float32, device)
    z = torch.randn(case.n, case.c, case.h, case.w, dtype=torch.complex64, device=device)
    view = z.conj().imag
    assert view.is_neg()
    expected = depthwise_separable_conv2d(view.resolve_neg().contiguous(), *weights)
    torch.testing.assert_close(depthwise_separable_conv2d(view, *weights), expected)
