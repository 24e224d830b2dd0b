"""The block with two BatchNorms against stock modules: outputs, running statistics and gradients, by the budget of
oracle.py; and its statistics where they are hard."""

import copy
import itertools
from dataclasses import dataclass, replace

import pytest
import torch
from shapes import described, identify
from torch import Tensor, nn

from bench.accuracy import errors, results
from dsconv_cuda import BatchNormArguments, DepthwiseSeparableConvBN2d, _loader, depthwise_separable_conv_bn2d

pytestmark = pytest.mark.usefixtures("isa", "inputs_at_pages")


@dataclass(frozen=True)
class Shape:
    n: int = 3
    c: int = 13
    multiplier: int = 1
    c_out: int = 17
    h: int = 13
    w: int = 11
    kernel: int = 3
    stride: int = 1
    dilation: int = 1
    bias: bool = True
    activation: str = "relu6"
    out_activation: str = "relu"

    def __str__(self):
        return described(self)

    def block(self, **options) -> DepthwiseSeparableConvBN2d:
        block = DepthwiseSeparableConvBN2d(
            self.c,
            self.c_out,
            self.kernel,
            self.stride,
            self.dilation * (self.kernel // 2),
            dilation=self.dilation,
            channel_multiplier=self.multiplier,
            bias=self.bias,
            activation=self.activation,
            out_activation=self.out_activation,
            **options,
        )
        with torch.no_grad():
            for norm in (block.bn1, block.bn2):
                norm.weight.uniform_(0.5, 2)
                norm.bias.normal_()
                norm.running_mean.normal_()
                norm.running_var.uniform_(0.5, 2)
        return block

    def input(self, channels_last: bool = False) -> Tensor:
        x = 3 * torch.randn(self.n, self.c, self.h, self.w) + 1
        return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def check(block: nn.Module, x: Tensor, device) -> None:
    """The block against its Plain in fp64: within twice Plain's own error in the dtype, the largest of some orders of
    summation, as in oracle.py."""
    eps = torch.finfo(x.dtype).eps
    for name, found in errors(block, x, device).items():
        budget = (3 if x.dtype == torch.float64 else 2) * found.stock + eps * found.size
        assert found.ours <= budget, f"{name} is off by {found.ours:.3g}, allowed is {budget:.3g}"


SHAPES = [
    Shape(),
    Shape(n=2, c=33, c_out=40, h=14, w=14, stride=2, activation="gelu", out_activation="silu"),
    Shape(n=1, c=64, c_out=96, h=28, w=28, kernel=5, out_activation="identity"),
    Shape(c=3, multiplier=3, c_out=17, h=11, w=13, activation="hardswish", out_activation="tanh"),
    Shape(c=8, multiplier=2, c_out=4, h=12, w=12, stride=2, activation="identity"),
    Shape(n=2, c=19, c_out=31, h=15, w=17, dilation=2, bias=False, activation="leaky_relu"),
    # many channels on few pixels: the CPU backward goes by panels of them, in one tile of pixels and in several
    Shape(n=1, c=272, c_out=100, h=14, w=14, activation="silu"),
    Shape(n=2, c=260, c_out=180, h=12, w=12, stride=1, out_activation="relu6"),
    Shape(n=3, c=2, c_out=3, h=7, w=5, kernel=1, activation="silu"),
]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_training(shape, channels_last, isa, device):
    if isa == "emulated" and shape.c * shape.h * shape.w > 20000:
        pytest.skip("what is large for the CPU's sake")
    check(shape.block(), shape.input(channels_last), device)


@pytest.mark.parametrize(("first_norm", "c", "stride"), [(True, 48, 1), (False, 48, 1), (True, 84, 2)])
def test_tensors_that_no_cache_holds(first_norm, c, stride, isa, device):
    """More than kSharedCacheBytes: the next tile is asked for, or by steps of 2 this one read first; z is summed of all
    channels at a time; and the norm after y and its gradient, without a first norm a pass of its own, write past the
    caches. Smooth, since among millions of values some lie at any kink."""
    if isa == "emulated":
        pytest.skip("what is large for the CPU's sake")
    shape = Shape(n=2, c=c, c_out=32, h=187, w=186, stride=stride, bias=False, activation="silu", out_activation="tanh")
    block = shape.block()
    if not first_norm:
        block.bn1 = nn.Identity()
    check(block, shape.input(channels_last=True), device)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=identify)
@pytest.mark.parametrize("channels_last", [False, True])
def test_dtypes(dtype, channels_last, device):
    """Without kinks: 16 bits round y, which moves some values across one, in PyTorch as here, but not the same ones."""
    for shape in SHAPES[1:4:2]:
        shape = replace(shape, out_activation="silu")
        check(shape.block(dtype=dtype), shape.input(channels_last).to(dtype), device)


def _batch(norm):
    return norm


def _frozen(norm):
    return norm.eval()


def _without_parameters(norm):
    return nn.BatchNorm2d(norm.num_features, affine=False)


def _without_running_statistics(norm):
    return nn.BatchNorm2d(norm.num_features, track_running_stats=False)


def _absent(norm):
    return nn.Identity()


KINDS = (_batch, _frozen, _without_parameters, _without_running_statistics, _absent)


@pytest.mark.parametrize(("first", "second"), list(itertools.product(KINDS, repeat=2)))
def test_every_pair_of_norms(first, second, device):
    """Batch statistics, frozen, without parameters, without running statistics, none: each beside each."""
    shape = Shape(activation="silu", out_activation="sigmoid")
    block = shape.block()
    block.bn1, block.bn2 = first(block.bn1), second(block.bn2)
    check(block, shape.input(), device)


def test_eval_uses_running_statistics(device):
    shape = Shape()
    block = shape.block().eval()
    check(block, shape.input(), device)
    block.bn1.track_running_stats = False  # read when the module is made; PyTorch goes by the buffers
    check(block, shape.input(), device)


@pytest.mark.parametrize("channels_last", [False, True])
def test_statistics_of_a_large_mean_and_a_small_deviation(channels_last, device):
    """Mean 1e4, deviation 1e-2 in float32: E[z^2] - E[z]^2 would have no digit."""
    _loader.load_library()
    x = (1e4 + 1e-2 * torch.randn(8, 20, 20, 20, dtype=torch.float64)).float().to(device)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    ops = torch.ops.dsconv_cuda
    one = torch.ones(20, 1, 1, 1, device=device)
    exact = x.double().cpu()
    for mean, variance in (
        ops.moments(x),
        ops.z_moments(x, one, one.view(1, 20), None, (1, 1), (0, 0, 0, 0), (1, 1)),
    ):
        torch.testing.assert_close(mean.cpu(), exact.mean((0, 2, 3)), rtol=0, atol=1e-7)
        torch.testing.assert_close(variance.cpu(), exact.var((0, 2, 3), unbiased=False), rtol=1e-5, atol=0)


def test_block_of_a_large_mean_and_a_small_deviation(device):
    shape = Shape(n=4, c=6, kernel=1)
    check(shape.block(), 1e4 + 1e-2 * torch.randn(4, 6, 13, 11), device)


def test_zero_scale_has_gradients(device):
    """gamma = 0, as the last norm of a residual branch begins: zhat is not what follows it over gamma."""
    shape = Shape(activation="silu")
    block = shape.block()
    with torch.no_grad():
        block.bn1.weight.zero_()
        block.bn2.weight[::2] = 0
    check(block, shape.input(), device)


def test_gradients_against_finite_differences(device):
    shape = Shape(n=2, c=2, c_out=3, h=4, w=3, activation="silu", out_activation="tanh")
    block = shape.block(dtype=torch.float64).to(device)
    names = [name for name, _ in block.named_parameters()]

    def function(x, *parameters):
        for norm in (block.bn1, block.bn2):
            norm.train()
        return torch.func.functional_call(block, dict(zip(names, parameters, strict=True)), (x,))

    x = shape.input().double().to(device).requires_grad_()
    assert torch.autograd.gradcheck(function, (x, *block.parameters()), fast_mode=True)


def test_function_with_other_arguments(device):
    """Norms given as arguments: weights in two dimensions, statistics moved in place, momentum."""
    shape = Shape()
    block = shape.block().to(device)
    x = shape.input().to(device)
    expected = copy.deepcopy(block)(x)
    norms = [
        BatchNormArguments(n.running_mean.clone(), n.running_var.clone(), n.weight, n.bias, True, 0.25, n.eps)
        for n in (block.bn1, block.bn2)
    ]
    out = depthwise_separable_conv_bn2d(
        x, block.depthwise.weight, block.pointwise.weight.flatten(1), block.depthwise.bias, block.pointwise.bias,
        *norms, padding=1, activation="relu6",
    )  # fmt: skip
    assert torch.equal(out, expected)
    block.bn1.momentum = block.bn2.momentum = 0.25
    block(x)
    for norm, module in zip(norms, (block.bn1, block.bn2), strict=True):
        assert torch.equal(norm.running_mean, module.running_mean)
        assert torch.equal(norm.running_var, module.running_var)


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_same_bits_for_any_number_of_threads(channels_last, device):
    threads = torch.get_num_threads()
    try:
        for shape in (SHAPES[1], SHAPES[6], Shape(n=3, c=17, c_out=50, h=31, w=29)):
            block, x = shape.block().to(device), shape.input(channels_last).to(device)
            found = []
            for count in (1, 2, 3, 7):
                torch.set_num_threads(count)
                dy = torch.ones_like(copy.deepcopy(block)(x)).cumsum(1)
                found.append(results(block, x, dy))
            for other in found[1:]:
                assert all(torch.equal(value, other[name]) for name, value in found[0].items())
    finally:
        torch.set_num_threads(threads)


def test_recomputing_the_output_gives_the_same_bits(device):
    shape = Shape(out_activation="silu")
    block, x = shape.block().to(device), shape.input().to(device)
    dy = torch.randn_like(copy.deepcopy(block)(x))
    kept = results(block, x, dy)
    block.recompute_output = True
    again = results(block, x, dy)
    assert all(torch.equal(value, again[name]) for name, value in kept.items())


def test_empty_batch(device):
    block = Shape().block().to(device)
    before = [b.clone() for b in block.buffers()]
    x = torch.zeros(0, 13, 13, 11, device=device, requires_grad=True)
    out = block(x)
    assert out.shape == (0, 17, 13, 11)
    out.sum().backward()
    assert x.grad.shape == x.shape
    assert all(p.grad is not None and not p.grad.any() for p in block.parameters())
    for name, old in zip(dict(block.named_buffers()), before, strict=True):
        if "num_batches" not in name:
            assert torch.equal(block.get_buffer(name), old), name
