"""The module and the example network."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import dsconv_cuda
from dsconv_cuda import DepthwiseSeparableConv, DepthwiseSeparableConv2d

pytestmark = [pytest.mark.usefixtures("isa"), pytest.mark.one_isa]


class Plain(nn.Module):
    """The two convolutions that the module stands for."""

    def __init__(self, c_in, c_out, kernel_size, stride=1, padding=0, dilation=1, bias=False, multiplier=1):
        super().__init__()
        c_mid = c_in * multiplier
        self.depthwise = nn.Conv2d(c_in, c_mid, kernel_size, stride, padding, dilation, groups=c_in, bias=bias)
        self.pointwise = nn.Conv2d(c_mid, c_out, 1, bias=bias)

    def forward(self, x):
        return self.pointwise(self.depthwise(x))


@pytest.mark.parametrize("bias", [False, True])
def test_same_state_dict_same_initial_weights_same_result(bias, device):
    torch.manual_seed(3)
    fused = DepthwiseSeparableConv2d(6, 10, (3, 5), (2, 1), "valid", bias, dilation=(1, 2), channel_multiplier=2)
    torch.manual_seed(3)
    plain = Plain(6, 10, (3, 5), (2, 1), "valid", (1, 2), bias, multiplier=2)
    assert list(fused.state_dict()) == list(plain.state_dict())
    for a, b in zip(fused.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)
    x = torch.randn(2, 6, 12, 14, device=device)
    torch.testing.assert_close(fused.to(device)(x), plain.to(device)(x))


@pytest.mark.parametrize("bias", [False, True])
def test_state_dict_goes_both_ways(bias):
    fused, plain = DepthwiseSeparableConv2d(4, 8, 3, bias=bias), Plain(4, 8, 3, bias=bias)
    fused.load_state_dict(plain.state_dict())
    assert torch.equal(fused.depthwise.weight, plain.depthwise.weight)
    with torch.no_grad():
        for p in fused.parameters():
            p.add_(1)
    plain.load_state_dict(fused.state_dict())
    assert torch.equal(fused.pointwise.weight, plain.pointwise.weight)


def test_positional_arguments_of_the_interface():
    module = DepthwiseSeparableConv(32, 64, 3, 1, 1)
    assert DepthwiseSeparableConv is DepthwiseSeparableConv2d
    assert module.depthwise.padding == (1, 1)
    assert module.depthwise.bias is None
    assert module.pointwise.bias is None
    assert DepthwiseSeparableConv2d(32, 64, 3, 1, 1, True).pointwise.bias is not None


def _trained_alike(a: nn.Module, b: nn.Module, x: torch.Tensor):
    ya, yb = a(x), b(x)
    assert torch.equal(ya, yb)
    ya.sum().backward()
    yb.sum().backward()
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_deepcopy_and_pickle():
    module = DepthwiseSeparableConv2d(4, 8, 3, padding="same", bias=True, activation=nn.SiLU(), out_activation="relu6")
    x = torch.randn(1, 4, 6, 6)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        module.zero_grad()
        _trained_alike(module, other, x)
        assert repr(other) == repr(module)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    module.zero_grad()
    _trained_alike(module, torch.load(file, weights_only=False), x)


def test_repr_says_what_the_children_do_not():
    module = DepthwiseSeparableConv2d(4, 8, 3, activation=nn.ReLU6(), out_activation=None)
    text = repr(module)
    assert text.startswith("DepthwiseSeparableConv2d(\n  activation=relu6, out_activation=identity\n")
    assert "(depthwise): Conv2d(4, 4, kernel_size=(3, 3), stride=(1, 1), groups=4, bias=False)" in text
    assert "(pointwise): Conv2d(4, 8, kernel_size=(1, 1), stride=(1, 1), bias=False)" in text


def test_device_dtype_and_half(device):
    module = DepthwiseSeparableConv2d(4, 8, 3, bias=True, device=device, dtype=torch.float64)
    x = torch.randn(2, 4, 6, 6, device=device)
    assert module(x.double()).dtype == torch.float64
    assert module.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    assert module.half()(x.half()).dtype == torch.float16
    channels_last = module.float().to(memory_format=torch.channels_last)
    assert channels_last(x).is_contiguous(memory_format=torch.channels_last)


def test_parametrized_weights(device):
    module = DepthwiseSeparableConv2d(4, 8, 3, bias=True).to(device)
    nn.utils.parametrizations.weight_norm(module.pointwise)
    module(torch.randn(2, 4, 6, 6, device=device)).sum().backward()
    assert module.pointwise.parametrizations.weight.original0.grad is not None


def test_unbatched_input(device):
    module = DepthwiseSeparableConv2d(4, 8, 3).to(device)
    x = torch.randn(4, 6, 6, device=device)
    assert torch.equal(module(x), module(x[None])[0])


def test_example_net(device):
    """The network of the task: its layers, its shapes, and an optimiser step that lowers the loss."""
    net = dsconv_cuda.models.ExampleNet().to(device)
    kinds = [(type(m).__name__, *(tuple(p.shape) for p in m.parameters())) for m in net.children()]
    assert kinds == [
        ("Conv2d", (32, 3, 3, 3), (32,)),
        ("DepthwiseSeparableConv2d", (32, 1, 3, 3), (64, 32, 1, 1)),
        ("Conv2d", (128, 64, 3, 3), (128,)),
    ]
    x = torch.randn(2, 3, 16, 16, device=device)
    assert net(x).shape == (2, 128, 16, 16)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = net(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]


def test_example_net_equals_plain_pytorch(device):
    net = dsconv_cuda.models.ExampleNet()
    plain = nn.Sequential(nn.Conv2d(3, 32, 3, 1, 1), Plain(32, 64, 3, 1, 1), nn.Conv2d(64, 128, 3, 1, 1))
    names = {"conv1": "0", "dsconv": "1", "conv2": "2"}
    plain.load_state_dict({names[k.split(".")[0]] + k[k.index(".") :]: v for k, v in net.state_dict().items()})
    x = torch.randn(2, 3, 12, 12, device=device)
    torch.testing.assert_close(net.to(device)(x), plain.to(device)(x), rtol=1e-4, atol=1e-5)


def test_what_the_package_exports():
    assert set(dsconv_cuda.__all__) <= set(dir(dsconv_cuda))
    assert all(hasattr(dsconv_cuda, name) for name in dsconv_cuda.__all__)
    with pytest.raises(AttributeError, match="no attribute 'depthwise_conv'"):
        _ = dsconv_cuda.depthwise_conv
