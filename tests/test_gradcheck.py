"""First and second derivatives against finite differences, in float64."""

import functools
import warnings

import pytest
import torch
from shapes import GEOMETRIES, Case, identify
from torch.autograd import gradcheck, gradgradcheck

from dsconv_cuda import depthwise_separable_conv2d
from dsconv_cuda.activations import ACTIVATIONS

pytestmark = pytest.mark.usefixtures("isa")

TINY = Case(n=2, c=2, c_out=3, h=4, w=3, activation="silu")


def _function(case: Case):
    return functools.partial(depthwise_separable_conv2d, **case.kwargs)


def _tensors(case: Case, device):
    return tuple(case.tensors(torch.float64, device, requires_grad=True))


@pytest.fixture(autouse=True)
def _no_warning_of_pytorchs_own():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*torch.jit.script.*", FutureWarning)
        yield


@pytest.mark.parametrize("out_activation", list(ACTIVATIONS))
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_first_and_second_order(activation, out_activation, device):
    """All pairs of activations, all inputs; every kink is further away from the values than the step."""
    case = Case(n=1, c=2, c_out=2, h=4, w=3, activation=activation, out_activation=out_activation)
    tensors = _tensors(case, device)
    assert gradcheck(_function(case), tensors, fast_mode=True)
    assert gradgradcheck(_function(case), tensors, fast_mode=True)


@pytest.mark.parametrize("case", GEOMETRIES, ids=identify)
def test_geometries(case, device):
    case = Case(
        n=1, c=2, multiplier=2, c_out=3, h=8, w=7, kernel=tuple(min(k, 5) for k in case.kernel), stride=case.stride,
        padding=case.padding, dilation=(1, case.dilation[1]), activation="silu", out_activation="tanh",
    )  # fmt: skip
    tensors = _tensors(case, device)
    assert gradcheck(_function(case), tensors, fast_mode=True)
    assert gradgradcheck(_function(case), tensors, fast_mode=True)


@pytest.mark.parametrize("out_activation", ["identity", "sigmoid", "gelu"])
def test_every_element(out_activation, device):
    """The whole Jacobian, not a random projection of it; forward mode, and batched gradients too."""
    case = Case(n=1, c=2, c_out=2, h=3, w=2, kernel=(2, 3), activation="gelu_tanh", out_activation=out_activation)
    tensors = _tensors(case, device)
    assert gradcheck(
        _function(case), tensors, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )
    assert gradgradcheck(_function(case), tensors, check_fwd_over_rev=True, check_batched_grad=True)


@pytest.mark.parametrize("wanted", range(5))
@pytest.mark.parametrize("out_activation", ["identity", "silu"])
def test_second_order_in_one_input_alone(wanted, out_activation, device):
    case = Case(n=1, c=2, c_out=3, h=4, w=3, activation="tanh", out_activation=out_activation)
    tensors = case.tensors(torch.float64, device)
    tensors[wanted].requires_grad_()
    assert gradcheck(_function(case), tuple(tensors), fast_mode=True)
    # In a bias of a linear output the gradient is dy itself; to the second order it needs another non-linearity.
    assert gradgradcheck(lambda *t: _function(case)(*t).square(), tuple(tensors), fast_mode=True)


@pytest.mark.parametrize("layout", ["channels_last", "unbatched", "weights in two dimensions", "no biases"])
def test_layouts(layout, device):
    x, dw_weight, pw_weight, dw_bias, pw_bias = TINY.tensors(torch.float64, device, layout == "channels_last")
    if layout == "unbatched":
        x = x[0]
    if layout == "weights in two dimensions":
        pw_weight = pw_weight.flatten(1)
    tensors = [x, dw_weight, pw_weight] if layout == "no biases" else [x, dw_weight, pw_weight, dw_bias, pw_bias]
    tensors = tuple(t.detach().requires_grad_() for t in tensors)
    assert gradcheck(_function(TINY), tensors, fast_mode=True)
    assert gradgradcheck(_function(TINY), tensors, fast_mode=True)


@pytest.mark.parametrize(
    "case", [Case(c=9, c_out=17, h=8, w=9, activation="gelu"), Case(c=33, c_out=8, stride=(2, 2))], ids=identify
)
def test_larger_than_a_tile(case, device):
    tensors = _tensors(case, device)
    assert gradcheck(_function(case), tensors, fast_mode=True)
    assert gradgradcheck(_function(case), tensors, fast_mode=True)


def test_third_order(device):
    """The second-order formulas are differentiable compositions."""
    case = Case(n=1, c=1, c_out=1, h=3, w=3, activation="tanh", out_activation="sigmoid", dw_bias=False, pw_bias=False)
    x, *weights = case.tensors(torch.float64, device)

    def second_derivative(x):
        (first,) = torch.autograd.grad(_function(case)(x, *weights).sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x, create_graph=True)[0]

    assert gradcheck(second_derivative, (x.requires_grad_(),))


def test_gradient_penalty_trains(device):
    """The usual use of double backward: the norm of the input's gradient as a loss, against stock convolutions."""
    from dsconv_cuda import reference

    case = Case(activation="silu", out_activation="tanh")
    tensors = _tensors(case, device)

    def penalty(op):
        (grad,) = torch.autograd.grad(op(*tensors, **case.kwargs).sum(), tensors[0], create_graph=True)
        return torch.autograd.grad(grad.square().sum(), tensors[1:3])

    for actual, expected in zip(
        penalty(depthwise_separable_conv2d), penalty(reference.depthwise_separable_conv2d), strict=True
    ):
        torch.testing.assert_close(actual, expected)
