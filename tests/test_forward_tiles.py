"""Every kind of tile of the tensor-core forward, whichever the planner would take: they give the same bits, and right
ones; with the value before the activation, with moments of y for a norm, and in TF32.
"""

import pytest
import torch
from oracle import check_case
from shapes import Case, identify

from dsconv_cuda import _loader
from dsconv_cuda.activations import ACTIVATIONS

pytestmark = [
    pytest.mark.usefixtures("isa"),
    pytest.mark.skipif(
        "config.getoption('--backend') != 'emulated'", reason="only the emulation can be asked for a plan"
    ),
]

PLANS = {"wide": 2, "narrow": 3, "small": 4, "square": 5, "flat": 6}
DTYPES = [torch.float16, torch.bfloat16]
# Around tiles of 128 pixels and channels, chunks of 32 channels, and one or two of them in shared memory.
CASES = [
    Case(n=1, c=32, c_out=128, h=16, w=16, out_activation="relu6"),
    Case(n=2, c=33, c_out=129, h=13, w=11, out_activation="leaky_relu"),
    Case(n=3, c=65, c_out=127, h=7, w=7),
    Case(n=1, c=96, c_out=257, h=9, w=17, stride=(2, 2)),
    Case(n=1, c=160, c_out=130, h=8, w=8, kernel=(5, 5), padding=(2, 2), out_activation="relu"),
    Case(n=2, c=20, multiplier=2, c_out=200, h=6, w=9, kernel=(7, 7), padding=(3, 3)),
    Case(n=1, c=8, c_out=136, h=1, w=150, kernel=(1, 9), padding=(0, 4)),
]
IN_TF32 = [0, 1, 3]


@pytest.fixture
def plan(monkeypatch):
    monkeypatch.setenv("DSCONV_SPLIT_IMAGES", "0")
    return lambda name: monkeypatch.setenv("DSCONV_FORWARD_PLAN", str(PLANS[name]))


def arguments(case: Case, act: str | None = None) -> tuple:
    """What the ops take behind the tensors."""
    pad = [*case.padding, *case.padding]
    names = [case.activation, act or case.out_activation]
    return case.stride, pad, case.dilation, *(ACTIVATIONS[name].number for name in names)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=identify)
@pytest.mark.parametrize("case", CASES, ids=identify)
def test_all_give_the_same_bits(case, dtype, channels_last, device, plan):
    tensors = case.tensors(dtype, device, channels_last)
    _loader.load_library()
    results = {}
    for name in PLANS:
        plan(name)
        results[name] = torch.ops.dsconv_cuda.fwd_with_pre(*tensors, *arguments(case))
    for name, (y, pre) in results.items():
        assert torch.equal(y, results["small"][0]), name
        assert torch.equal(pre, results["small"][1]), name
    plan("square")
    check_case(case, dtype, device, channels_last)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("case", CASES, ids=identify)
def test_moments_of_what_they_write(case, channels_last, device, plan):
    tensors = case.tensors(torch.float16, device, channels_last)
    ops = torch.ops.dsconv_cuda
    vectors = ops.norm_vectors(ops.z_moments(*tensors[:4], *arguments(case)[:3]), None, None, 1e-5)
    for name in PLANS:
        plan(name)
        y, moments = ops.fwd_norm(*tensors, vectors, *arguments(case)[:4], True)
        mean, var = moments
        dims = (0, 2, 3)
        torch.testing.assert_close(mean, y.double().mean(dims), rtol=1e-3, atol=2e-3)
        torch.testing.assert_close(var, y.double().var(dims, correction=0), rtol=5e-3, atol=2e-3)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("case", [CASES[i] for i in IN_TF32], ids=identify)
def test_in_tf32(case, channels_last, device, plan):
    """How far from exact they may be is in test_tf32.py."""
    tensors = case.tensors(torch.float32, device, channels_last)
    results = []
    for name in PLANS:
        plan(name)
        results.append(torch.ops.dsconv_cuda.fwd(*tensors, *arguments(case), True))
    exact = torch.ops.dsconv_cuda.fwd(*tensors, *arguments(case), False)
    assert not torch.equal(results[0], exact)
    for result in results[1:]:
        assert torch.equal(result, results[0])


def test_an_activation_without_registers(device, plan):
    """An activation that square tiles have no registers for goes by another kind."""
    case = Case(n=1, c=32, c_out=128, h=16, w=16, out_activation="gelu")
    plan("square")
    check_case(case, torch.float16, device, True)
