"""The ops of training through BatchNorm as torch.library sees them: schemas, fake kernels, their own checks."""

import pytest
import torch
from torch.library import opcheck

from dsconv_cuda import _loader

pytestmark = [pytest.mark.usefixtures("isa"), pytest.mark.one_isa]

GEOMETRY = ([2, 1], [1, 1, 1, 1], [1, 1])
SILU, TANH = 4, 9
TESTS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.fixture(autouse=True)
def _registered():
    _loader.load_library()


def _operands(dtype, device, channels_last, multiplier=1):
    middle = 6 * multiplier
    x = torch.randn(2, 6, 9, 7).to(device, dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    weights = [torch.randn(*s).to(device, dtype) for s in ((middle, 1, 3, 3), (5, middle, 1, 1), (middle,), (5,))]
    return x, *weights


@pytest.mark.parametrize(
    ("dtype", "channels_last", "multiplier"),
    [(torch.float32, True, 1), (torch.float64, False, 2), (torch.bfloat16, True, 2)],
)
def test_opcheck(dtype, channels_last, multiplier, device):
    ops = torch.ops.dsconv_cuda
    x, dw, pw, dw_bias, pw_bias = _operands(dtype, device, channels_last, multiplier)
    arguments = {"z_moments": (x, dw, pw, dw_bias, *GEOMETRY)}
    moments = ops.z_moments(*arguments["z_moments"])
    gamma = torch.rand(dw.shape[0], device=device)
    arguments["norm_vectors"] = (moments, gamma, None, 1e-5)
    vectors = ops.norm_vectors(*arguments["norm_vectors"])
    arguments["fwd_norm"] = (x, dw, pw, dw_bias, pw_bias, vectors, *GEOMETRY, SILU, True)
    y, _ = ops.fwd_norm(*arguments["fwd_norm"])
    arguments["moments"] = (y,)
    out_vectors = ops.norm_vectors(ops.moments(y), None, None, 1e-5)
    arguments["norm_act"] = (y, out_vectors, TANH)
    grad = torch.randn_like(y)
    arguments["norm_act_sums"] = (grad, y, out_vectors, TANH)
    sums = ops.norm_act_sums(*arguments["norm_act_sums"])
    arguments["norm_act_grad"] = (grad, y, out_vectors, sums, 70.0, TANH)
    behind = (out_vectors, sums, 70.0)
    operands = (x, dw, pw, dw_bias)
    for mask in (15, 0, 20):
        both = (grad, y, *operands, vectors, *behind, *GEOMETRY, SILU, TANH, mask)
        opcheck(ops.bwd_norm.default, both, test_utils=TESTS)
        opcheck(ops.bwd_norm_pointwise.default, both, test_utils=TESTS[:2])  # du has room that nothing is written to
        alone = (grad, None, *operands, vectors, None, None, 1.0, *GEOMETRY, SILU, 0, mask)
        opcheck(ops.bwd_norm.default, alone, test_utils=TESTS)
    du, du_sums, *_ = ops.bwd_norm_pointwise(grad, y, *operands, vectors, *behind, *GEOMETRY, SILU, TANH, 31)
    arguments["bwd_norm_depthwise"] = (du, *operands, vectors, du_sums, 70.0, *GEOMETRY, 3)
    for name, args in arguments.items():
        opcheck(getattr(ops, name).default, args, test_utils=TESTS)


def test_the_stages_apart_give_the_gradients_of_both_together(device):
    ops = torch.ops.dsconv_cuda
    x, dw, pw, dw_bias, pw_bias = _operands(torch.float64, device, True)
    vectors = ops.norm_vectors(ops.z_moments(x, dw, pw, dw_bias, *GEOMETRY), None, None, 1e-5)
    grad = torch.randn_like(ops.fwd_norm(x, dw, pw, dw_bias, pw_bias, vectors, *GEOMETRY, SILU, False)[0])
    operands = (x, dw, pw, dw_bias)
    alone = (None, None, 1.0, *GEOMETRY, SILU, 0, 31)
    grad_x, grad_dw, grad_pw, grad_b, sums = ops.bwd_norm(grad, None, *operands, vectors, *alone)
    du, du_sums, other_pw, other_b = ops.bwd_norm_pointwise(grad, None, *operands, vectors, *alone)
    other_x, other_dw = ops.bwd_norm_depthwise(du, *operands, vectors, du_sums, 70.0, *GEOMETRY, 3)
    for a, b in ((grad_x, other_x), (grad_dw, other_dw), (grad_pw, other_pw), (grad_b, other_b), (sums, du_sums)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("channels_last", [False, True])
def test_opcheck_behind_another_norm(channels_last, device):
    ops = torch.ops.dsconv_cuda
    x, dw, pw, dw_bias, pw_bias = _operands(torch.float32, device, channels_last)
    in_norm = (ops.norm_vectors(ops.moments(x), None, None, 1e-5), TANH)
    operands = (x, dw, pw, dw_bias)
    arguments = {"z_moments": (*operands, *GEOMETRY, *in_norm)}
    vectors = ops.norm_vectors(ops.z_moments(*arguments["z_moments"]), None, None, 1e-5)
    arguments["fwd_norm"] = (*operands, pw_bias, vectors, *GEOMETRY, SILU, True, *in_norm)
    grad = torch.randn_like(ops.fwd_norm(*arguments["fwd_norm"])[0])
    alone = (grad, None, *operands, vectors, None, None, 1.0, *GEOMETRY, SILU, 0, 15, *in_norm)
    arguments["bwd_norm"] = alone
    du, sums, *_ = ops.bwd_norm_pointwise(*alone)
    opcheck(ops.bwd_norm_pointwise.default, alone, test_utils=TESTS[:2])
    arguments["bwd_norm_depthwise"] = (du, *operands, vectors, sums, 70.0, *GEOMETRY, 3, *in_norm)
    for name, args in arguments.items():
        opcheck(getattr(ops, name).default, args, test_utils=TESTS)


def test_what_would_read_outside_of_a_tensor_is_refused(device):
    ops = torch.ops.dsconv_cuda
    x, dw, pw, dw_bias, pw_bias = _operands(torch.float32, device, False)
    vectors = ops.norm_vectors(ops.z_moments(x, dw, pw, dw_bias, *GEOMETRY), None, None, 1e-5)
    y, moments = ops.fwd_norm(x, dw, pw, dw_bias, pw_bias, vectors, *GEOMETRY, SILU, True)
    torch.testing.assert_close(moments, ops.moments(y), rtol=1e-5, atol=1e-5)  # summed in another order, in float32
    of_y = ops.norm_vectors(ops.moments(y), None, None, 1e-5)
    operands = (x, dw, pw, dw_bias)
    for call in (
        lambda: ops.fwd_norm(x, dw, pw, dw_bias, pw_bias, vectors[:, :5], *GEOMETRY, SILU, True),
        lambda: ops.fwd_norm(x, dw, pw, dw_bias, pw_bias, vectors.float(), *GEOMETRY, SILU, True),
        lambda: ops.fwd_norm(x, dw, pw, dw_bias, pw_bias, vectors, *GEOMETRY, SILU, True, vectors[:, :2], 0),
        lambda: ops.fwd_norm(x, dw, pw, dw_bias, pw_bias, vectors, *GEOMETRY, SILU, True, vectors, 11),
        lambda: ops.z_moments(x, dw, pw, dw_bias, *GEOMETRY, vectors[:2], 0),
        lambda: ops.bwd_norm(y, None, *operands, vectors, None, None, 1.0, *GEOMETRY, SILU, 0, 31, of_y, 0),
        lambda: ops.norm_act(y, vectors, 0),
        lambda: ops.norm_act(y, of_y, 11),
        lambda: ops.norm_act(y[0], of_y, 0),
        lambda: ops.norm_act_sums(y[:1], y, of_y, 0),
        lambda: ops.norm_act_sums(y.double(), y, of_y, 0),
        lambda: ops.norm_act_grad(y, y, of_y, of_y, 1.0, 0),
        lambda: ops.norm_vectors(of_y[:2], torch.ones(4, device=device), None, 1e-5),
        lambda: ops.norm_vectors(of_y[:2], torch.ones(5, device=device, dtype=torch.int32), None, 1e-5),
        lambda: ops.norm_track(of_y, 3.0, 0.1, None, None),
        lambda: ops.norm_track(of_y[:2], 3.0, 0.1, torch.ones(4, device=device), None),
        lambda: ops.norm_track(of_y[:2], 3.0, 0.1, None, torch.ones(5, device=device, dtype=torch.int32)),
        lambda: ops.bwd_norm(y, y[..., 1:], *operands, vectors, of_y, None, 1.0, *GEOMETRY, SILU, 0, 31),
        lambda: ops.bwd_norm(y, y, *operands, vectors, None, None, 1.0, *GEOMETRY, SILU, 0, 31),
        lambda: ops.bwd_norm_depthwise(y.flatten(), *operands, vectors, vectors[:2], 1.0, *GEOMETRY, 3),
    ):
        with pytest.raises(RuntimeError, match="dsconv_cuda"):
            call()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_norm_track(dtype, device):
    """Running statistics as F.batch_norm moves them, in place and through strides, either of them alone too."""
    if not _loader.tracks_in_one_call(device.type):
        pytest.skip("an op of the CPU kernels")
    v = torch.randn(3, 5, 4, 4, dtype=torch.float64) * 3 + 7
    start = torch.rand(2, 5, dtype=torch.float64) + 0.5
    expected = [row.clone() for row in start]
    torch.nn.functional.batch_norm(v, *expected, training=True, momentum=0.3)
    moments = torch.ops.dsconv_cuda.moments(v)
    for given in ((0, 1), (0,), (1,)):
        room = torch.zeros(2, 10, dtype=dtype)
        statistics = [room[row, ::2].copy_(start[row]) if row in given else None for row in (0, 1)]
        arguments = (moments, 48.0, 0.3, *statistics)
        opcheck(torch.ops.dsconv_cuda.norm_track.default, arguments, test_utils=TESTS)
        for row in given:
            statistics[row].copy_(start[row])
        torch.ops.dsconv_cuda.norm_track(*arguments)
        for row in given:
            torch.testing.assert_close(
                statistics[row], expected[row].to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=0
            )
        assert room[:, 1::2].eq(0).all()
