"""1-D convolutions, causal padding, and the padding modes of the modules, against PyTorch's own."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from oracle import check
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dsconv_cuda import (
    DepthwiseSeparableConv1d,
    DepthwiseSeparableConv2d,
    DepthwiseSeparableConv3d,
    depthwise_separable_conv1d,
    depthwise_separable_conv2d,
)

pytestmark = pytest.mark.usefixtures("isa")

# (channels, kernel, length, stride, padding, dilation): Conformer, QuartzNet, a strided one, short causal convolutions
SHAPES = [
    (16, 31, 100, 1, 15, 1),
    (12, 33, 83, 1, "same", 1),
    (7, 87, 200, 1, 86, 2),
    (9, 5, 40, 3, 2, 1),
    (8, 4, 33, 1, "causal", 1),
    (5, 4, 33, 2, "causal", 3),
    (5, 2, 9, 1, "same", 1),
    (6, 3, 11, 1, "valid", 2),
]


def _tensors(c, k, length, dtype, device, multiplier=1):
    shapes = ((2, c, length), (c * multiplier, 1, k), (10, c * multiplier, 1), (c * multiplier,), (10,))
    return [torch.randn(s).to(device, dtype) for s in shapes]


def _as_rows(x, dw_weight, pw_weight, dw_bias, pw_bias, **kwargs):
    """The 1-D function with the operands of the oracle, which are images of one row."""
    kwargs = {name: value[-1] if isinstance(value, tuple) else value for name, value in kwargs.items()}
    y = depthwise_separable_conv1d(x.squeeze(2), dw_weight.squeeze(2), pw_weight.squeeze(3), dw_bias, pw_bias, **kwargs)
    return y.unsqueeze(2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[4] != "causal"], ids=str)
def test_forward_and_backward(shape, dtype, device):
    c, k, length, stride, padding, dilation = shape
    x, dw_weight, pw_weight, *biases = _tensors(c, k, length, dtype, device)
    kwargs = {
        "stride": (1, stride),
        "padding": padding if isinstance(padding, str) else (0, padding),
        "dilation": (1, dilation),
        "activation": "silu",
    }
    check([x.unsqueeze(2), dw_weight.unsqueeze(2), pw_weight.unsqueeze(3), *biases], kwargs, True, _as_rows)


# Groups of 32 channels and a rest; taps in pairs, quadruples and with one left over.
ROWS_IN_16_BITS = [
    (48, 31, 60, 1, 15, 1),
    (33, 33, 83, 1, "same", 1),
    (32, 87, 100, 1, 43, 1),
    (35, 5, 40, 3, 2, 1),
    (40, 4, 33, 2, 3, 1),
    (64, 9, 50, 1, 8, 2),
]


@pytest.mark.parametrize("multiplier", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", ROWS_IN_16_BITS, ids=str)
def test_16_bits(shape, dtype, multiplier, device):
    c, k, length, stride, padding, dilation = shape
    if multiplier == 2:
        c = c // 4
    x, dw_weight, pw_weight, *biases = _tensors(c, k, length, dtype, device, multiplier)
    if dtype == torch.bfloat16:
        x = x.mT.contiguous().mT
    kwargs = {
        "stride": (1, stride),
        "padding": padding if isinstance(padding, str) else (0, padding),
        "dilation": (1, dilation),
        "activation": "relu6",
    }
    # PyTorch's own bfloat16 gradients of dilations crash (2.14.1 on AVX512-BF16).
    operands = [x.unsqueeze(2), dw_weight.unsqueeze(2), pw_weight.unsqueeze(3), *biases]
    check(operands, kwargs, dilation == 1, _as_rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[4] == "causal"], ids=str)
def test_causal_padding_in_16_bits(shape, dtype, device):
    """The same bits as with zeros put in front by hand."""
    c, k, length, stride, _, dilation = shape
    x, *weights = [t.requires_grad_() for t in _tensors(c, k, length, dtype, device)]
    y = depthwise_separable_conv1d(x, *weights, stride, "causal", dilation, "relu")
    padded = depthwise_separable_conv1d(F.pad(x, (dilation * (k - 1), 0)), *weights, stride, 0, dilation, "relu")
    assert torch.equal(y, padded)
    dy = torch.randn_like(y)
    for ours, theirs in zip(torch.autograd.grad(y, weights, dy), torch.autograd.grad(padded, weights, dy), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("shape", [s for s in SHAPES if s[4] == "causal"], ids=str)
def test_causal_padding(shape, device):
    """As zeros put in front by hand, and no output sees what comes after it."""
    c, k, length, stride, _, dilation = shape
    tensors = [t.requires_grad_() for t in _tensors(c, k, length, torch.float64, device, multiplier=2)]

    def stock(x, dw_weight, pw_weight, dw_bias, pw_bias):
        x = F.pad(x, (dilation * (k - 1), 0))
        return F.conv1d(F.gelu(F.conv1d(x, dw_weight, dw_bias, stride, 0, dilation, c)), pw_weight, pw_bias)

    y = depthwise_separable_conv1d(*tensors, stride, "causal", dilation, "gelu")
    expected = stock(*tensors)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, tensors, dy), torch.autograd.grad(expected, tensors, dy))
    with torch.no_grad():
        x, *weights = tensors
        t = length // 2
        later = torch.cat([x[..., : t + 1], torch.full_like(x[..., t + 1 :], torch.nan)], -1)
        seen = depthwise_separable_conv1d(later, *weights, stride, "causal", dilation, "gelu")
        assert torch.equal(seen[..., : t // stride + 1], y[..., : t // stride + 1])


@pytest.mark.one_isa
@pytest.mark.parametrize("kwargs", [{"padding": "causal"}, {"padding": 2, "padding_mode": "circular"}, {"stride": 2}])
def test_the_module(kwargs, device):
    module = DepthwiseSeparableConv1d(6, 8, 5, bias=True, activation="relu", **kwargs).to(device)
    x = torch.randn(2, 6, 20, device=device)

    def stock(x):
        x = F.pad(x, (4, 0)) if module.causal else x
        return module.pointwise(module.depthwise(x).relu())

    torch.testing.assert_close(module(x), stock(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(module(x[0]), stock(x[:1])[0], rtol=1e-4, atol=1e-5)
    assert module(x.mT.contiguous().mT).shape == module(x).shape
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), module(x))
    plain = nn.ModuleDict({"depthwise": module.depthwise, "pointwise": module.pointwise})
    assert list(module.state_dict()) == list(plain.state_dict())
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x))
    torch._dynamo.reset()
    seen = []
    module.pointwise.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(module(x), stock(x), rtol=1e-4, atol=1e-5)
    assert seen == [1, 1]


@pytest.mark.one_isa
@pytest.mark.parametrize("padding", [1, (2, 1), "same"])
@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_modes(mode, padding, device):
    """Values and all gradients are those of nn.Conv2d with that mode."""
    module = DepthwiseSeparableConv2d(
        4, 6, (4, 3), padding=padding, padding_mode=mode, bias=True, activation="silu", dtype=torch.float64
    ).to(device)
    x = torch.randn(2, 4, 9, 8, device=device, dtype=torch.float64, requires_grad=True)
    wanted = [x, *module.parameters()]
    for _ in range(2):
        y, expected = module(x), module.pointwise(F.silu(module.depthwise(x)))
        torch.testing.assert_close(y, expected)
        dy = torch.randn_like(y)
        torch.testing.assert_close(torch.autograd.grad(y, wanted, dy), torch.autograd.grad(expected, wanted, dy))
    with torch.no_grad():
        torch.testing.assert_close(module(x), expected.detach())
        torch.testing.assert_close(module(x[0]), expected.detach()[0])


@pytest.mark.one_isa
def test_no_copy_of_the_input(device):
    """What is kept for backward is the input itself, with causal padding too."""
    x, *weights = _tensors(8, 4, 33, torch.float32, device)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        depthwise_separable_conv1d(x.requires_grad_(), *weights, 1, "causal")
    assert x.data_ptr() in [t.data_ptr() for t in kept]
    assert not [t for t in kept if t.numel() > x.numel()]


class _Ops(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function).rsplit(".", 1)[0])
        return function(*args, **(kwargs or {}))


@pytest.mark.one_isa
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_same_padding_of_even_kernels_makes_no_copy(dims, device):
    """One op forward and one backward on the input itself, where nn.Conv pads a copy."""
    kind = {1: DepthwiseSeparableConv1d, 2: DepthwiseSeparableConv2d, 3: DepthwiseSeparableConv3d}[dims]
    module = kind(4, 6, 4, padding="same").to(device)
    x = torch.randn(2, 4, *(7, 9, 8)[:dims], device=device, requires_grad=True)
    kept = []
    with _Ops() as ran, torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = module(x)
        y.sum().backward()
    views = {"aten.unsqueeze", "aten.squeeze", "aten.sum", "aten.ones_like", "aten.expand", "aten.detach"}
    assert [name for name in ran.names if name not in views] == ["dsconv_cuda.fwd", "dsconv_cuda.bwd"]
    assert y.shape == (2, 6, *x.shape[2:])
    assert [t.data_ptr() for t in kept if t.numel() == x.numel()] == [x.data_ptr()]
    assert max(t.numel() for t in kept) == x.numel()


@pytest.mark.one_isa
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"input": torch.randn(2, 3, 4, 5)}, r"input must have shape \[N, C, L\]"),
        ({"dw_weight": torch.randn(4, 1, 3, 3)}, r"dw_weight must have shape \[C \* m, 1, k\]"),
        ({"pw_weight": torch.randn(6, 4, 3)}, "kernel size 1"),
        ({"stride": (1, 2)}, "stride must be an int"),
        ({"padding": "left"}, '"causal"'),
        ({"padding": "same", "stride": 2}, "stride 1 only"),
    ],
)
def test_errors(change, words):
    arguments = {"input": torch.randn(2, 4, 9), "dw_weight": torch.randn(4, 1, 3), "pw_weight": torch.randn(6, 4, 1)}
    with pytest.raises(ValueError, match=f"depthwise_separable_conv1d: .*{words}"):
        depthwise_separable_conv1d(**(arguments | change))
    with pytest.raises(ValueError, match="depthwise_separable_conv2d: input must have shape"):
        depthwise_separable_conv2d(torch.randn(1, 4, 3, 9, 9), torch.randn(4, 1, 3, 3), torch.randn(6, 4, 1, 1))
