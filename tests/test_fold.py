"""A norm folded into the weights before it in one call: the composition's numbers, derivatives of any order."""

import itertools

import pytest
import torch
from torch import nn

from dsconv_cuda import BatchNormArguments, norms

pytestmark = [pytest.mark.usefixtures("isa"), pytest.mark.one_isa]


@pytest.fixture
def differentiable(device):
    if not norms._has_fold(device.type.upper(), gradients=True):
        pytest.skip("an op of the CPU kernels")


def operands(shape=(7, 1, 3, 3), dtype=torch.float32, of_norm=None, without=()):
    """weight, bias, mean, var, gamma, beta."""
    torch.manual_seed(0)
    of_norm = of_norm or dtype
    channels = shape[0]
    made = {
        "weight": torch.randn(shape, dtype=dtype),
        "bias": torch.randn(channels, dtype=dtype),
        "mean": torch.randn(channels, dtype=of_norm),
        "var": torch.rand(channels, dtype=of_norm) + 0.1,
        "gamma": torch.randn(2, channels, dtype=of_norm)[0],
        "beta": torch.randn(channels, 2, dtype=of_norm)[:, 0],
    }
    for name in ("weight", "bias", "gamma", "beta"):
        made[name].requires_grad_()
    return [None if name in without else t for name, t in made.items()]


def _arguments(tensors):
    weight, bias, *of_norm = tensors
    return weight, bias, BatchNormArguments(*of_norm, eps=1e-3)


@pytest.mark.parametrize("without", [(), ("bias",), ("gamma", "beta"), ("bias", "beta")], ids=str)
@pytest.mark.parametrize("shape", [(7, 1, 3, 3), (5, 33, 1, 1), (4, 1, 19), (3, 8)], ids=str)
def test_the_numbers_of_the_composition(shape, without, differentiable):
    tensors = operands(shape, without=without)
    assert norms._in_one_call(tuple(tensors))
    actual, expected = norms.fold_norm(*_arguments(tensors)), norms._fold(*tensors, 1e-3)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    asked = [t for t in tensors if t is not None and t.requires_grad]
    grads = [torch.randn_like(t) for t in expected]
    actual, expected = (torch.autograd.grad(folded, asked, grads) for folded in (actual, expected))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dtype", "of_norm"), itertools.product((torch.float32, torch.float64), repeat=2))
def test_types_and_strides(dtype, of_norm, differentiable):
    tensors = operands(dtype=dtype, of_norm=of_norm)
    tensors[0] = tensors[0].detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    weight, bias = norms.fold_norm(*_arguments(tensors))
    assert weight.stride() == tensors[0].stride()
    assert weight.dtype == bias.dtype == dtype
    asked = [t for t in tensors if t.requires_grad]
    grads = torch.autograd.grad(weight.square().sum() + bias.sum(), asked)
    assert [g.dtype for g in grads] == [t.dtype for t in asked]
    assert grads[0].stride() == tensors[0].stride()


@pytest.mark.parametrize("without", [(), ("bias",), ("gamma", "beta"), ("bias", "beta")], ids=str)
@pytest.mark.parametrize(
    ("dtype", "of_norm"), itertools.product((torch.float16, torch.bfloat16, torch.float64), (torch.float32, None))
)
@torch.no_grad()
def test_without_gradients(device, dtype, of_norm, without):
    """On every device, and for 16-bit weights too."""
    tensors = [None if t is None else t.to(device) for t in operands((5, 150, 1, 1), dtype, of_norm, without)]
    assert norms._in_one_call(tuple(tensors))
    actual, expected = norms.fold_norm(*_arguments(tensors)), norms._fold(*tensors, 1e-3)
    for a, e in zip(actual, expected, strict=True):
        assert (a.dtype, a.stride()) == (e.dtype, e.stride())
        torch.testing.assert_close(a, e, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)


def test_derivatives_of_higher_order(differentiable):
    tensors = operands((3, 2, 2, 1), torch.float64)
    asked = [t for t in tensors if t.requires_grad]

    def fold(*values):
        values = iter(values)
        return norms.fold_norm(*_arguments([next(values) if t.requires_grad else t for t in tensors]))

    assert torch.autograd.gradcheck(fold, asked)
    assert torch.autograd.gradgradcheck(fold, asked)


def test_first_derivatives_with_a_graph_of_their_own(differentiable):
    """Hooks on parameters and parameters that appear twice count once."""
    tensors = operands()
    tensors[4].register_hook(lambda grad: 2 * grad)
    tensors[5] = tensors[4]
    asked = [t for t in tensors[:5] if t.requires_grad]
    results = []
    for create_graph in (False, True):
        weight, bias = norms.fold_norm(*_arguments(tensors))
        results.append(torch.autograd.grad(weight.square().sum() + bias.sum(), asked, create_graph=create_graph))
    weight, bias = norms._fold(*tensors, 1e-3)
    results.append(torch.autograd.grad(weight.square().sum() + bias.sum(), asked))
    for grads in results[1:]:
        torch.testing.assert_close(grads, results[0], rtol=1e-4, atol=1e-4)


def test_what_goes_by_the_composition(differentiable):
    """Statistics with gradients, other types and layouts, and torch.func."""
    tensors = operands()
    tensors[2].requires_grad_()
    bias = norms.fold_norm(*_arguments(tensors))[1]
    assert torch.autograd.grad(bias.sum(), tensors[2])[0].shape == (7,)
    tensors = operands()
    tensors[0] = tensors[0].detach().expand(7, 2, 3, 3)
    assert not norms._in_one_call(tuple(tensors))
    norms.fold_norm(*_arguments(tensors))
    tensors = [None if t is None else t.detach() for t in operands()]

    def loss(weight):
        return norms.fold_norm(*_arguments([weight, *tensors[1:]]))[0].square().sum()

    torch.testing.assert_close(torch.func.grad(loss)(tensors[0]), torch.func.jacfwd(loss)(tensors[0]))


def test_the_ops_refuse_what_they_would_read_outside_of():
    ops = torch.ops.dsconv_cuda
    weight, bias, mean, var, gamma, beta = (t.detach() for t in operands())
    for wrong in (
        lambda: ops.fold_norm(weight, bias, mean[:3], var, gamma, beta, 1e-5),
        lambda: ops.fold_norm(weight, bias, mean, var, gamma.int(), beta, 1e-5),
        lambda: ops.fold_norm(weight.transpose(2, 3), bias, mean, var, gamma, beta, 1e-5),
        lambda: ops.fold_norm_bwd(weight[:2], bias, weight, bias, mean, var, gamma, 1e-5),
        lambda: ops.fold_norm_bwd(weight, bias.double(), weight, bias, mean, var, gamma, 1e-5),
    ):
        with pytest.raises(RuntimeError, match="dsconv_cuda::fold_norm"):
            wrong()


def test_training_with_frozen_norms_calls_it(differentiable):
    called = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(func)
            return func(*args, **(kwargs or {}))

    conv, norm = nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4).eval()
    folded = norms.fold_norm(conv.weight, conv.bias, norms.arguments_of(norm, False))
    assert "_Fold" in type(folded[0].grad_fn).__name__
    with Watch():  # where others watch, they see the operations
        norms.fold_norm(conv.weight, conv.bias, norms.arguments_of(norm, False))
    assert called
