"""torch.func: grad, vjp, jvp, vmap, jacrev, jacfwd, hessian and their compositions, against stock convolutions."""

import collections
import functools
import warnings

import pytest
import torch
from shapes import Case
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils._python_dispatch import TorchDispatchMode

from dsconv_cuda import depthwise_separable_conv2d, reference

pytestmark = pytest.mark.usefixtures("isa")

OUT_ACTIVATIONS = ("identity", "tanh", "gelu")  # nothing saved, y saved, the value before it saved
EVERY = (0, 1, 2, 3, 4)


@pytest.fixture(autouse=True)
def _no_warning_of_pytorchs_own():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*vmap.*fallback.*|.*performance drop.*")
        warnings.filterwarnings("ignore", ".*torch.jit.script.*", FutureWarning)
        yield


def _case(out_activation: str) -> Case:
    return Case(n=2, c=3, multiplier=2, c_out=4, h=5, w=4, activation="silu", out_activation=out_activation)


def _both(case: Case):
    return (
        functools.partial(depthwise_separable_conv2d, **case.kwargs),
        functools.partial(reference.depthwise_separable_conv2d, **case.kwargs),
    )


def _assert_same(transform, case: Case, *args):
    fused, stock = _both(case)
    actual, expected = transform(fused)(*args), transform(stock)(*args)
    torch.testing.assert_close(actual, expected)


def _loss(op):
    return lambda *tensors: op(*tensors).square().sum()


@pytest.mark.parametrize("out_activation", OUT_ACTIVATIONS)
def test_grad_and_vjp(out_activation, device):
    case = _case(out_activation)
    tensors = case.tensors(torch.float64, device)
    _assert_same(lambda op: grad(_loss(op), EVERY), case, *tensors)

    def pull_back(op):
        def run(*tensors):
            y, back = vjp(op, *tensors)
            return y, back(torch.ones_like(y))

        return run

    _assert_same(pull_back, case, *tensors)


@pytest.mark.parametrize("out_activation", OUT_ACTIVATIONS)
def test_grad_of_grad(out_activation, device):
    case = _case(out_activation)

    def second(op):
        return grad(lambda *t: grad(_loss(op))(*t).square().sum(), EVERY)

    _assert_same(second, case, *case.tensors(torch.float64, device))


@pytest.mark.parametrize("out_activation", OUT_ACTIVATIONS)
def test_jvp(out_activation, device):
    case = _case(out_activation)
    tensors, tangents = case.tensors(torch.float64, device), case.tensors(torch.float64, device)
    _assert_same(lambda op: lambda *t: jvp(op, tuple(t), tuple(tangents)), case, *tensors)


@pytest.mark.parametrize("out_activation", OUT_ACTIVATIONS)
def test_jvp_of_grad_and_grad_of_jvp(out_activation, device):
    case = _case(out_activation)
    tensors, tangents = case.tensors(torch.float64, device), tuple(case.tensors(torch.float64, device))
    _assert_same(lambda op: lambda *t: jvp(grad(_loss(op), EVERY), tuple(t), tangents), case, *tensors)
    _assert_same(lambda op: grad(lambda *t: jvp(op, tuple(t), tangents)[1].square().sum(), EVERY), case, *tensors)


@pytest.mark.parametrize("batched", [(0,), (1,), (2,), (3,), (4,), (0, 1, 2, 3, 4), (0, 2)], ids=str)
@pytest.mark.parametrize("out_activation", OUT_ACTIVATIONS)
def test_vmap(batched, out_activation, device):
    """Only the input batched: one call on the joined batch. A weight batched: one call each. No fallback warning."""
    case = _case(out_activation)
    fused, stock = _both(case)
    copies = [case.tensors(torch.float64, device) for _ in range(3)]
    args = [torch.stack([c[i] for c in copies]) if i in batched else copies[0][i] for i in range(5)]
    in_dims = tuple(0 if i in batched else None for i in range(5))
    torch.testing.assert_close(vmap(fused, in_dims)(*args), vmap(stock, in_dims)(*args))
    torch.testing.assert_close(
        vmap(grad(_loss(fused), EVERY), in_dims)(*args), vmap(grad(_loss(stock), EVERY), in_dims)(*args)
    )


class _Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        namespace, name, _ = str(function).split(".")
        if namespace == "dsconv_cuda":
            self.count[name.replace("_with_pre", "")] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.one_isa
@pytest.mark.parametrize("out_activation", OUT_ACTIVATIONS)
def test_which_batches_are_one_call(out_activation, device):
    """Those of inputs, and of their gradients; those of weights, and of their gradients, are one call of many."""
    case = _case(out_activation)
    fused, stock = _both(case)
    x, *weights = case.tensors(torch.float64, device)
    xs, several = torch.randn(5, *x.shape, device=device, dtype=x.dtype), [torch.stack([w, 2 * w, -w]) for w in weights]
    inputs, every = (0, None, None, None, None), (None, 0, 0, 0, 0)
    forward, backward, forward_each, backward_each = "fwd", "bwd", "fwd_each", "bwd_each"
    for transform, args, calls in (
        (lambda op: vmap(op, inputs), (xs, *weights), {forward: 1}),
        (lambda op: vmap(vmap(op, inputs), inputs), (xs.unflatten(0, (1, 5)), *weights), {forward: 1}),
        (lambda op: vmap(grad(_loss(op)), inputs), (xs, *weights), {forward: 1, backward: 1}),
        (lambda op: vmap(grad(_loss(op), (1, 2)), inputs), (xs, *weights), {forward: 1, backward_each: 1}),
        (lambda op: vmap(op, every), (x, *several), {forward_each: 1}),
        (lambda op: vmap(grad(_loss(op), EVERY), every), (x, *several), {forward_each: 1, backward_each: 1}),
    ):
        with _Calls() as counted:
            actual = transform(fused)(*args)
        assert counted.count == calls
        torch.testing.assert_close(actual, transform(stock)(*args))


@pytest.mark.parametrize("dim", [1, 2, -1])
def test_vmap_over_another_dimension(dim, device):
    case = _case("identity")
    fused, stock = _both(case)
    x, *weights = case.tensors(torch.float64, device)
    xs = torch.stack([x, 2 * x, -x], dim)
    in_dims = (dim, None, None, None, None)
    torch.testing.assert_close(
        vmap(fused, in_dims, out_dims=1)(xs, *weights), vmap(stock, in_dims, out_dims=1)(xs, *weights)
    )


def test_vmap_of_an_unbatched_input_and_nested(device):
    case = _case("tanh")
    x, *weights = case.tensors(torch.float64, device)
    _assert_same(lambda op: lambda x: vmap(lambda image: op(image, *weights))(x), case, x)
    xs = torch.stack([x, -x])
    _assert_same(lambda op: lambda xs: vmap(vmap(lambda image: op(image, *weights)))(xs), case, xs)


def test_vmap_over_nothing(device):
    fused, _ = _both(_case("identity"))
    x, *weights = _case("identity").tensors(torch.float64, device)
    xs = x.new_empty((0, *x.shape))
    assert vmap(fused, (0, None, None, None, None))(xs, *weights).shape == (0, 2, 4, 5, 4)


@pytest.mark.parametrize("out_activation", OUT_ACTIVATIONS)
def test_per_sample_gradients(out_activation, device):
    case = _case(out_activation)
    x, *weights = case.tensors(torch.float64, device)

    def per_sample(op):
        return lambda x, *w: vmap(grad(lambda x, *w: _loss(op)(x, *w), (1, 2, 3, 4)), (0, None, None, None, None))(
            x, *w
        )

    _assert_same(per_sample, case, x, *weights)


@pytest.mark.parametrize("jacobian", [jacrev, jacfwd])
@pytest.mark.parametrize("out_activation", OUT_ACTIVATIONS)
def test_jacobians(jacobian, out_activation, device):
    case = Case(n=1, c=2, c_out=2, h=3, w=3, activation="silu", out_activation=out_activation)
    _assert_same(lambda op: jacobian(op, EVERY), case, *case.tensors(torch.float64, device))


@pytest.mark.parametrize(
    "second",
    [
        hessian,
        lambda f, a: jacrev(jacrev(f, a), a),
        lambda f, a: jacfwd(jacfwd(f, a), a),
        lambda f, a: jacrev(jacfwd(f, a), a),
    ],
    ids=["forward over reverse", "reverse over reverse", "forward over forward", "reverse over forward"],
)
@pytest.mark.parametrize("out_activation", OUT_ACTIVATIONS)
def test_hessians(second, out_activation, device):
    case = Case(n=1, c=2, c_out=2, h=3, w=2, activation="silu", out_activation=out_activation)
    _assert_same(lambda op: second(_loss(op), (0, 1, 2)), case, *case.tensors(torch.float64, device))


def test_functional_call_of_the_module(device):
    from dsconv_cuda import DepthwiseSeparableConv2d

    module = DepthwiseSeparableConv2d(
        3, 4, 3, padding=1, bias=True, activation="relu", device=device, dtype=torch.float64
    )
    parameters = dict(module.named_parameters())
    x = torch.randn(2, 3, 5, 5, device=device, dtype=torch.float64)

    def loss(parameters):
        return torch.func.functional_call(module, parameters, (x,)).square().sum()

    loss(parameters).backward()
    for name, value in grad(loss)(parameters).items():
        torch.testing.assert_close(value, module.get_parameter(name).grad)
