"""nchw by planes (csrc/cpu/depthwise_planes.inl, forward_planes.inl, backward_planes.inl): the forward, the statistics
of z and of y, the gradients, around the ends of vectors, blocks of rows and tiles. Whatever instruction set runs, the
result is that of the oracle."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from oracle import check
from shapes import Case

from dsconv_cuda import DepthwiseSeparableConv2d, _loader, depthwise_separable_conv2d
from dsconv_cuda.activations import ACTIVATIONS

pytestmark = pytest.mark.usefixtures("isa")
WIDE, HALVES = [torch.float32, torch.float64], [torch.float16, torch.bfloat16]

SHAPES = [
    *(Case(n=2, c=5, c_out=15, h=9, w=w) for w in (28, 31, 32, 33, 48, 49, 63, 64, 65, 97)),
    *(Case(n=2, c=3, c_out=14, h=h, w=60, stride=(2, 2)) for h in (3, 8, 13, 30)),
    *(Case(n=1, c=4, c_out=29, h=11, w=w, stride=(2, 2)) for w in (56, 57, 63, 64, 66, 129)),
    *(Case(n=1, c=4, c_out=3, h=h, w=58, kernel=(5, 5), stride=(2, 2), padding=(2, 2)) for h in (5, 12, 19)),
    Case(n=3, c=2, c_out=33, h=5, w=29),  # tiles of several images
    Case(n=2, c=2, c_out=5, h=40, w=30, padding=(0, 0)),
    Case(n=1, c=2, c_out=5, h=7, w=32, padding=(4, 5)),  # rows and columns of nothing but padding
    Case(n=1, c=2, c_out=5, h=7, w=61, stride=(2, 2), padding=(3, 6)),
    Case(n=2, c=300, c_out=17, h=3, w=28),  # two chains of additions
    Case(n=1, c=64, c_out=70, h=57, w=57),
    Case(n=1, c=3, c_out=9, h=8, w=40, activation="silu", out_activation="relu"),
    Case(n=1, c=3, c_out=9, h=8, w=40, dw_bias=False, pw_bias=False),
]


BACKWARD = [
    *(Case(n=2, c=18, c_out=9, h=h, w=60, stride=(2, 2)) for h in (7, 8, 30)),
    *(Case(n=1, c=33, c_out=15, h=23, w=w, stride=(2, 2)) for w in (56, 57, 63, 64, 65, 66, 95, 96, 129)),
    *(
        Case(n=1, c=5, c_out=24, h=19, w=61, stride=(2, 2), padding=padding)
        for padding in ((0, 0), (1, 0), (0, 1), (2, 3), (3, 2), (4, 6))
    ),
    Case(n=20, c=17, c_out=6, h=11, w=58, stride=(2, 2)),  # tiles of several images
    Case(n=1, c=210, c_out=7, h=57, w=56, stride=(2, 2)),  # z some panels at a time
    Case(n=1, c=5, c_out=3, h=9, w=500, stride=(2, 2)),  # a row is a tile
    Case(n=2, c=18, c_out=9, h=21, w=60, stride=(2, 2), activation="silu", out_activation="relu6"),
    Case(n=2, c=18, c_out=9, h=21, w=60, stride=(2, 2), activation="identity", out_activation="gelu"),
    Case(n=1, c=3, c_out=9, h=17, w=60, stride=(2, 2), dw_bias=False, pw_bias=False),
]


def _plans(case: Case, dtype: torch.dtype, backward: bool = False) -> dict:
    kernel, padding = case.kernel, [*case.padding, *case.padding]
    return _loader.load_library().module.cpu_plan(
        [case.n, case.c, case.h, case.w], [case.c, 1, *kernel], case.c_out, stride=case.stride, padding=padding,
        dtype=str(dtype).removeprefix("torch."), backward=backward,
    )  # fmt: skip


def _widest(isa: str, dtype: torch.dtype) -> int:
    """The widest kernel that goes by planes."""
    return {"avx2": 3 if dtype.itemsize > 2 else 0, "avx512": 5}.get(isa, 0)


def _goes_by_planes(case: Case, dtype: torch.dtype, isa: str, backward: bool = False) -> None:
    # bf16 that is multiplied as it is goes so only where a norm is folded or much is written.
    if dtype != torch.bfloat16 and case.kernel[-1] <= _widest(isa, dtype):
        assert _plans(case, dtype, backward)["by_planes"], case


@pytest.mark.parametrize("dtype", [*WIDE, *HALVES])
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_forward(case, dtype, device, isa):
    _goes_by_planes(case, dtype, isa)
    check(case.tensors(dtype, device), case.kwargs)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_forward_with_a_norm_in_the_weights(case, dtype, device):
    """The norm that changes nothing."""
    vectors = torch.tensor([[0.0], [1.0], [1.0], [0.0]], dtype=torch.float64, device=device).repeat(1, case.c)

    def normed(x, dw, pw, db, pb, stride, padding, dilation, activation, out_activation):
        geometry = list(stride), [*padding, *padding], list(dilation)
        number = ACTIVATIONS[activation].number
        return torch.ops.dsconv_cuda.fwd_norm(x, dw, pw, db, pb, vectors, *geometry, number, False)[0]

    linear = dataclasses.replace(case, out_activation="identity")
    check(linear.tensors(dtype, device), linear.kwargs, op=normed)


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("case", BACKWARD, ids=str)
def test_backward(case, dtype, device, isa):
    _goes_by_planes(case, dtype, isa, backward=True)
    check(case.tensors(dtype, device), case.kwargs, True)


@pytest.mark.parametrize("mask", [1, 2, 3, 4, 8, 12, 24])
def test_gradients_that_are_asked_for(mask, device):
    """Each as where all are; others are empty."""
    case = BACKWARD[3]
    x, dw, pw, db, _ = case.tensors(torch.float32, device)
    geometry = (list(case.stride), [*case.padding, *case.padding], list(case.dilation))
    dy = torch.randn_like(depthwise_separable_conv2d(x, dw, pw, stride=2, padding=1))
    call = torch.ops.dsconv_cuda.bwd
    everything = call(dy, x, dw, pw, db, None, *geometry, 2, 0, 31)
    for i, (found, expected) in enumerate(
        zip(call(dy, x, dw, pw, db, None, *geometry, 2, 0, mask), everything, strict=True)
    ):
        if mask >> i & 1:
            torch.testing.assert_close(found, expected)
        else:
            assert found.numel() == 0


def test_backward_of_any_strides_reads_nothing_outside(device):
    case = Case(n=2, c=5, c_out=9, h=12, w=62, stride=(2, 2))
    x, *weights = case.tensors(torch.float32, device)
    x[..., -1] = float("nan")  # which no output reads
    padding = {"stride": 2, "padding": (0, 0)}
    around = torch.full((3, 8, 18, 75), float("nan"), device=device)
    view = around[:2, 1:6, 3:15, 7:69].copy_(x)
    dy = torch.randn_like(depthwise_separable_conv2d(x, *weights, **padding))
    gradients = []
    for given in (view, x):
        tensors = [t.detach().requires_grad_() for t in (given, *weights)]
        gradients.append(torch.autograd.grad(depthwise_separable_conv2d(*tensors, **padding), tensors, dy))
    for found, expected in zip(*gradients, strict=True):
        assert torch.equal(found, expected)
        assert not found.isnan().any()


@pytest.mark.parametrize("stride", [1, 2])
def test_any_strides_and_nothing_outside_is_read(stride, device):
    """Rows, channels and images apart from one another, with values around them that would be seen."""
    case = Case(n=2, c=5, c_out=9, h=9, w=62, stride=(stride, stride))
    x, *rest = case.tensors(torch.float32, device)
    around = torch.full((3, 8, 15, 75), float("nan"), device=device)
    view = around[:2, 1:6, 3:12, 7:69].copy_(x)
    assert torch.equal(
        depthwise_separable_conv2d(view, *rest, **case.kwargs), depthwise_separable_conv2d(x, *rest, **case.kwargs)
    )
    assert around.isnan().sum() == around.numel() - x.numel()


@pytest.mark.parametrize("case", [SHAPES[1], SHAPES[10], BACKWARD[2], Case(n=2, c=8, c_out=40, h=56, w=56)], ids=str)
def test_the_same_bits_for_any_number_of_threads(case, device):
    tensors, before = [t.requires_grad_() for t in case.tensors(torch.float32, device)], torch.get_num_threads()
    dy = torch.randn_like(depthwise_separable_conv2d(*tensors, **case.kwargs))
    try:
        results = []
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            y = depthwise_separable_conv2d(*tensors, **case.kwargs)
            results.append((y, *torch.autograd.grad(y, tensors, dy)))
    finally:
        torch.set_num_threads(before)
    for others in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(results[0], others, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("size", [(448, 448), (450, 449)], ids=str)
def test_more_than_the_caches_hold(size, dtype, device, isa):
    """Whole lines of y are written past the caches where they are lines."""
    if "avx" not in isa:
        pytest.skip("of the CPU kernels")
    case = Case(n=1, c=9, c_out=40, h=size[0], w=size[1], out_activation="relu6")
    if isa in ("avx2", "avx512"):
        assert _plans(case, dtype)["by_planes"] == (_widest(isa, dtype) > 0)
    check(case.tensors(dtype, device), case.kwargs)


@pytest.mark.parametrize("size", [(224, 224), (226, 225)], ids=str)
def test_gradients_that_the_caches_do_not_hold(size, device, isa):
    if "avx" not in isa:
        pytest.skip("of the CPU kernels")
    case = Case(n=1, c=48, c_out=4, h=size[0], w=size[1], stride=(2, 2))
    _goes_by_planes(case, torch.float32, isa, backward=True)
    check(case.tensors(torch.float32, device), case.kwargs, True)


@pytest.mark.parametrize("mean", [0.0, 1e4])
@pytest.mark.parametrize("case", [SHAPES[6], Case(n=3, c=18, c_out=20, h=57, w=60), SHAPES[11]], ids=str)
def test_statistics_of_z_and_y(case, mean, device):
    """Against float64, of z as stock PyTorch computes it in float32: E[z^2] - E[z]^2 would have no digit left."""
    ops = torch.ops.dsconv_cuda
    geometry = (list(case.stride), [*case.padding, *case.padding], list(case.dilation))
    x, dw, pw, *_ = case.tensors(torch.float32, device)
    dw = dw / dw.sum((2, 3), keepdim=True) if mean else dw
    x = x * 1e-2 + mean
    moments = ops.z_moments(x, dw, pw, None, *geometry)
    vectors = ops.norm_vectors(moments, None, None, 1e-5)
    y, y_moments = ops.fwd_norm(x, dw, pw, None, None, vectors, *geometry, 0, True)
    z = F.conv2d(x.cpu(), dw.cpu(), None, case.stride, case.padding, groups=case.c)
    for found, of in ((moments, z), (y_moments, y.cpu())):
        oracle = torch.stack((of.double().mean((0, 2, 3)), of.double().var((0, 2, 3), unbiased=False)))
        stock = torch.stack((of.mean((0, 2, 3)), of.var((0, 2, 3), unbiased=False)))
        eps = torch.finfo(torch.float32).eps
        # What z is rounded to, which differs by the order of the taps, moves a variance by its deviation times that.
        rounding = eps * oracle[1].sqrt() * of.abs().max() * 4
        budget = 2 * (stock - oracle).abs().amax(1) + eps * torch.stack((of.abs().max(), oracle[1].max())).double()
        for row, extra in ((0, 0 * rounding), (1, rounding)):
            difference = (found[row].cpu() - oracle[row]).abs()
            assert (difference <= budget[row] + extra).all(), f"{row}: {difference.max():.3g} of {budget[row]:.3g}"


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("case", [case for case in SHAPES if case.w >= 56], ids=str)
def test_statistics_of_z_of_16_bits(case, dtype, device):
    """z itself is float32 whatever x is: the same as of the same numbers in float32."""
    geometry = (list(case.stride), [*case.padding, *case.padding], list(case.dilation))
    operands = case.tensors(dtype, device)[:3]
    found, expected = (
        torch.ops.dsconv_cuda.z_moments(*(t.to(of) for t in operands), None, *geometry) for of in (dtype, torch.float32)
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_one_module_takes_both_layouts_in_turn(device):
    """Its packed weights have another form by planes."""
    module = DepthwiseSeparableConv2d(6, 20, 3, padding=1, activation="relu", device=device).eval()
    x = torch.randn(1, 6, 9, 56, device=device)
    other = x.contiguous(memory_format=torch.channels_last)
    weights = module.depthwise.weight, module.pointwise.weight
    with torch.no_grad():
        for given in (x, other, x, x, other, other):
            torch.testing.assert_close(
                module(given), depthwise_separable_conv2d(given, *weights, padding=1, activation="relu")
            )
