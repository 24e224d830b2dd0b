"""Forward-mode AD with dual tensors."""

import functools
import itertools
import warnings

import pytest
import torch
from shapes import GEOMETRIES, Case, identify
from torch.autograd import forward_ad, gradcheck

from dsconv_cuda import depthwise_separable_conv2d, reference
from dsconv_cuda.activations import ACTIVATIONS

pytestmark = pytest.mark.usefixtures("isa")


@pytest.fixture(autouse=True)
def _no_warning_of_pytorchs_own():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*torch.jit.script.*", FutureWarning)
        yield


def _tangent(op, tensors: list, tangents: list, kwargs: dict):
    with forward_ad.dual_level():
        duals = [p if t is None else forward_ad.make_dual(p, t) for p, t in zip(tensors, tangents, strict=True)]
        return forward_ad.unpack_dual(op(*duals, **kwargs))


def _compare(case: Case, device, which=(True,) * 5):
    tensors, tangents = case.tensors(torch.float64, device), case.tensors(torch.float64, device)
    tangents = [t if wanted else None for t, wanted in zip(tangents, which, strict=True)]
    actual = _tangent(depthwise_separable_conv2d, tensors, tangents, case.kwargs)
    expected = _tangent(reference.depthwise_separable_conv2d, tensors, tangents, case.kwargs)
    torch.testing.assert_close(actual.primal, expected.primal)
    torch.testing.assert_close(actual.tangent, expected.tangent)


@pytest.mark.parametrize("which", [w for w in itertools.product((True, False), repeat=5) if any(w)], ids=str)
def test_every_combination_of_tangents(which, device):
    _compare(Case(activation="gelu", out_activation="sigmoid"), device, which)


@pytest.mark.parametrize("out_activation", list(ACTIVATIONS))
@pytest.mark.parametrize("activation", ["identity", "relu", "silu", "hardswish"])
def test_activations(activation, out_activation, device):
    _compare(Case(activation=activation, out_activation=out_activation), device)


@pytest.mark.parametrize("case", GEOMETRIES, ids=identify)
def test_geometries(case, device):
    _compare(case, device)


@pytest.mark.parametrize("out_activation", ["identity", "tanh", "silu"])
def test_against_finite_differences(out_activation, device):
    case = Case(n=1, c=2, c_out=3, h=4, w=3, activation="silu", out_activation=out_activation)
    op = functools.partial(depthwise_separable_conv2d, **case.kwargs)
    tensors = tuple(case.tensors(torch.float64, device, requires_grad=True))
    assert gradcheck(op, tensors, check_forward_ad=True, check_backward_ad=False, fast_mode=True)


@pytest.mark.parametrize("no_grad", [True, False])
def test_tangents_without_gradients(no_grad, device):
    """A dual level is served under no_grad too, and does not need requires_grad."""
    case = Case(activation="silu")
    with torch.set_grad_enabled(not no_grad):
        _compare(case, device)


def test_no_tangent_where_none_goes_in(device):
    with forward_ad.dual_level():
        y = depthwise_separable_conv2d(*Case().tensors(torch.float64, device))
        assert forward_ad.unpack_dual(y).tangent is None
