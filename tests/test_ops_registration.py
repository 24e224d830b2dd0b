"""The ops as torch.library sees them: schemas, fake kernels, autograd and vmap registrations; and the bare ops' "
"own checks."""

import pytest
import torch
from shapes import Case
from torch.library import opcheck

from dsconv_cuda import _loader, ops
from dsconv_cuda.activations import ACTIVATIONS, derivative_from_output

pytestmark = [pytest.mark.usefixtures("isa"), pytest.mark.one_isa]

# Layouts of (input, dw_weight, pw_weight); each decides the output's, so the fake kernels have to agree on all.
LAYOUTS = {
    "contiguous": lambda x, dw, pw: (x, dw, pw),
    "channels_last": lambda x, dw, pw: (x.contiguous(memory_format=torch.channels_last), dw, pw),
    "channels_last weights": lambda x, dw, pw: (
        x,
        dw.contiguous(memory_format=torch.channels_last),
        pw.contiguous(memory_format=torch.channels_last),
    ),
    "sliced": lambda x, dw, pw: (torch.cat([x, x], 3)[..., 1 : x.shape[3] + 1], dw, pw),
    "transposed": lambda x, dw, pw: (x.transpose(2, 3), dw, pw),
    "expanded": lambda x, dw, pw: (x[:1].expand_as(x), dw, pw),
}


def _arguments(case: Case, dtype, device, layout="contiguous", requires_grad=False) -> tuple:
    x, dw, pw, *biases = case.tensors(dtype, device)
    tensors = [*LAYOUTS[layout](x, dw, pw), *biases]
    if requires_grad:
        tensors = [None if t is None else t.detach().requires_grad_() for t in tensors]
    act, out_act = ACTIVATIONS[case.activation].number, ACTIVATIONS[case.out_activation].number
    return (*tensors, case.stride, (*case.padding, *case.padding), case.dilation, act, out_act)


@pytest.fixture(autouse=True)
def _registered():
    _loader.load_library()


OUT_ACTIVATIONS = ("identity", "tanh", "silu")  # nothing saved, y saved, the value before it saved


def _turn(values, index: int):
    return values[index % len(values)]


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("requires_grad", [True, False])
def test_opcheck_forward(layout, requires_grad, device):
    turn = list(LAYOUTS).index(layout)
    biases = _turn((True, False), turn)
    case = Case(out_activation=_turn(OUT_ACTIVATIONS, turn), stride=(2, 1), dw_bias=biases, pw_bias=not biases)
    args = _arguments(case, torch.float32, device, layout, requires_grad)
    opcheck(torch.ops.dsconv_cuda.fwd.default, args)
    opcheck(torch.ops.dsconv_cuda.fwd_with_pre.default, args)


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("out_activation", OUT_ACTIVATIONS)
def test_opcheck_backward(layout, out_activation, device):
    turn = list(LAYOUTS).index(layout) + OUT_ACTIVATIONS.index(out_activation)
    biases = _turn((True, False), turn)
    case = Case(out_activation=out_activation, dw_bias=biases, pw_bias=biases)
    args = _arguments(case, torch.float32, device, layout)
    y, pre = torch.ops.dsconv_cuda.fwd_with_pre(*args)
    saved = None
    if out_activation != "identity":
        saved = y if derivative_from_output(args[-1]) else pre
    mask = _turn((31, ops.GRAD_X, ops.GRAD_DW_WEIGHT | ops.GRAD_PW_BIAS, 30, 0), turn)
    opcheck(torch.ops.dsconv_cuda.bwd.default, (torch.randn_like(y), *args[:4], saved, *args[5:], mask))


@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("channels_last", [False, True])
def test_opcheck_with_and_without_biases(biases, channels_last, device):
    """Every op, what it saves included."""
    layout = "channels_last" if channels_last else "contiguous"
    case = Case(dw_bias=biases, pw_bias=biases, activation="gelu", out_activation="hardswish")
    args = _arguments(case, torch.float32, device, layout, requires_grad=True)
    opcheck(torch.ops.dsconv_cuda.fwd.default, args)
    opcheck(torch.ops.dsconv_cuda.fwd_with_pre.default, args)
    args = _arguments(case, torch.float32, device, layout)
    y, pre = torch.ops.dsconv_cuda.fwd_with_pre(*args)
    opcheck(torch.ops.dsconv_cuda.bwd.default, (torch.randn_like(y), *args[:4], pre, *args[5:], 31))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_opcheck_dtypes(dtype, device):
    args = _arguments(Case(), dtype, device)
    opcheck(torch.ops.dsconv_cuda.fwd.default, args)
    dy = torch.randn_like(torch.ops.dsconv_cuda.fwd(*args))
    opcheck(torch.ops.dsconv_cuda.bwd.default, (dy, *args[:4], None, *args[5:], 31))


@pytest.mark.parametrize("n", [0, 1])
def test_opcheck_degenerate_shapes(n, device):
    for case in (
        Case(n=n),
        Case(n=n, c=1, c_out=1),
        Case(n=n, h=1, w=1),
        Case(n=n, c=1, h=1, w=1, kernel=(1, 1), padding=(0, 0)),
    ):
        for layout in ("contiguous", "channels_last"):
            opcheck(torch.ops.dsconv_cuda.fwd.default, _arguments(case, torch.float32, device, layout))


@pytest.mark.parametrize("out_activation", list(ACTIVATIONS))
def test_gradients_of_the_bare_op(out_activation, device):
    """torch.ops.dsconv_cuda.fwd called by hand trains like the function, also where forward kept nothing for "
    "backward."""
    from dsconv_cuda import depthwise_separable_conv2d

    case = Case(out_activation=out_activation, activation="silu")
    args = _arguments(case, torch.float64, device, requires_grad=True)
    y = torch.ops.dsconv_cuda.fwd(*args)
    dy = torch.randn_like(y)
    actual = torch.autograd.grad(y, args[:5], dy)
    expected = torch.autograd.grad(depthwise_separable_conv2d(*args[:5], **case.kwargs), args[:5], dy)
    torch.testing.assert_close(actual, expected)


def test_bare_ops_refuse_a_second_derivative(device):
    """Wrong numbers without a word would be the alternative."""
    args = _arguments(Case(activation="silu"), torch.float64, device, requires_grad=True)
    y = torch.ops.dsconv_cuda.fwd(*args)
    (grad_x,) = torch.autograd.grad(y.square().sum(), args[0], create_graph=True)
    with pytest.raises(RuntimeError, match="depthwise_separable_conv2d"):
        torch.autograd.grad(grad_x.sum(), args[1])


def test_bare_ops_check_what_would_read_outside_of_a_tensor(device):
    x, dw, pw, dw_bias, pw_bias, *rest = _arguments(Case(), torch.float32, device)
    fwd = torch.ops.dsconv_cuda.fwd
    for wrong in (
        (x[0], dw, pw, dw_bias, pw_bias, *rest),
        (x, dw[:, 0], pw, dw_bias, pw_bias, *rest),
        (x, dw[:-1], pw, dw_bias[:-1], pw_bias, *rest),
        (x, dw, pw[:, :-1], dw_bias, pw_bias, *rest),
        (x, dw, pw, dw_bias[:-1], pw_bias, *rest),
        (x, dw, pw, dw_bias, pw_bias[:-1], *rest),
        (x, dw.double(), pw, dw_bias, pw_bias, *rest),
        (x, dw, pw, dw_bias, pw_bias, (0, 1), *rest[1:]),
        (x, dw, pw, dw_bias, pw_bias, rest[0], (-1, 0, 0, 0), *rest[2:]),
        (x, dw, pw, dw_bias, pw_bias, *rest[:2], (0, 1), *rest[3:]),
        (x, dw, pw, dw_bias, pw_bias, *rest[:2], (99, 1), *rest[3:]),
        (x, dw, pw, dw_bias, pw_bias, *rest[:3], 11, 0),
        (x, dw, pw, dw_bias, pw_bias, *rest[:3], 0, -1),
        (x.int(), dw.int(), pw.int(), None, None, *rest),
    ):
        with pytest.raises(RuntimeError, match="dsconv_cuda"):
            fwd(*wrong)
    dy = torch.randn_like(fwd(x, dw, pw, dw_bias, pw_bias, *rest))
    for wrong_dy in (dy[:1], dy[:, 1:], dy[..., 1:], dy.double(), dy[0]):
        with pytest.raises(RuntimeError, match="dsconv_cuda"):
            torch.ops.dsconv_cuda.bwd(wrong_dy, x, dw, pw, dw_bias, None, *rest, 31)
    with pytest.raises(RuntimeError, match="saved"):
        torch.ops.dsconv_cuda.bwd(dy, x, dw, pw, dw_bias, dy, *rest, 31)


def test_meta_tensors_have_shapes():
    from dsconv_cuda import DepthwiseSeparableConv2d

    module = DepthwiseSeparableConv2d(3, 8, 3, 2, 1, bias=True, out_activation="gelu", device="meta")
    y = module(torch.empty(2, 3, 9, 9, device="meta", requires_grad=True))
    assert (y.shape, y.device.type) == ((2, 8, 5, 5), "meta")
    y.sum().backward()
    assert module.depthwise.weight.grad.shape == (3, 1, 3, 3)
