"""Backward of an nchw x, and of one behind a norm, whose rows groups of tiles turn as they come to them (turned.inl):
images smaller than a tile, windows that skip rows, and rows that no window reads."""

import pytest
import torch
from fusion_models import assert_as_precise
from oracle import check_case
from shapes import Case, identify
from test_batchnorm_block import Shape
from test_batchnorm_block import check as check_block
from test_norm_before import block, defers, needs_kernels

from dsconv_cuda import _loader, fuse

pytestmark = pytest.mark.usefixtures("isa")

MANY = 230  # images, so that there is much more of x than the rows that the groups keep
SHAPES = [
    Case(n=MANY, c=13, h=9, w=7),
    Case(n=4 * MANY, c=13, h=10, w=8, stride=(2, 2), padding=(0, 0)),  # nothing reads the last row
    Case(n=8 * MANY, c=16, h=11, w=5, stride=(3, 2), padding=(0, 1)),
    Case(n=2 * MANY, c=5, h=9, w=9, kernel=(7, 5), padding=(3, 2)),
    Case(n=2 * MANY, c=5, h=9, w=9, kernel=(1, 3), stride=(2, 1), padding=(0, 1)),  # rows between windows
    Case(n=MANY, c=5, h=9, w=7, padding=(4, 1)),  # outputs of nothing but padding
    Case(n=MANY, c=7, h=12, w=7, padding=(2, 2), dilation=(2, 2)),
    Case(n=MANY, c=5, h=9, w=7, multiplier=2),
    Case(n=3, c=17, h=250, w=61, stride=(1, 2)),
    Case(n=2, c=3, h=240, w=300),  # rows longer than a tile
]


def _assert_turns_rows(case, dtype):
    module = _loader.load_library().module
    if module is None:
        return  # the kernels of this backend come without the planner's queries
    plan = module.cpu_plan(
        [case.n, case.c, case.h, case.w], [case.c * case.multiplier, 1, *case.kernel], case.c_out, stride=case.stride,
        padding=[*case.padding, *case.padding], dilation=case.dilation, backward=True,
        dtype=str(dtype).removeprefix("torch."),
    )  # fmt: skip
    assert plan["x_rows"] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=identify)
@pytest.mark.parametrize("case", SHAPES, ids=identify)
def test_gradients(case, dtype, isa, device):
    if isa == "emulated":
        pytest.skip("of the CPU")
    _assert_turns_rows(case, dtype)
    check_case(case, dtype, device, channels_last=False, backward=True)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_block_with_batch_norms(stride, isa, device):
    if isa == "emulated":
        pytest.skip("of the CPU")
    shape = Shape(n=stride * MANY, h=9, w=7, stride=stride, activation="silu", out_activation="tanh")
    check_block(shape.block(), shape.input(), device)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("training", [False, True])
def test_behind_a_norm(training, layout, isa, device):
    if isa == "emulated":
        pytest.skip("of the CPU")
    needs_kernels(device)
    model = block(out_activation=torch.nn.SiLU(), activation=torch.nn.SiLU).to(device).train(training)
    fused, x = fuse(model), torch.randn(MANY, 8, 9, 7, device=device).contiguous(memory_format=layout)
    assert_as_precise(model, fused, x)
    with torch.set_grad_enabled(training):
        assert defers(fused, x)
