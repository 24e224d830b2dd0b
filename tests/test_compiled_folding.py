"""Fused models in graphs of torch.compile: norms fold and weights are packed once, and again when something changed."""

import copy
import gc
import weakref

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd

import dsconv_cuda
from dsconv_cuda import _loader, compiled_folding, compiled_weights

pytestmark = [pytest.mark.usefixtures("isa"), pytest.mark.one_isa]

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def chain(dims=2, bias=True, dtype=torch.float32):
    conv, norm = CONVOLUTIONS[dims], NORMS[dims]
    layers = [conv(6, 6, 3, padding=1, groups=6, bias=bias), norm(6), nn.SiLU(), conv(6, 10, 1, bias=bias), norm(10)]
    model = nn.Sequential(*layers, nn.ReLU())
    for module in model.modules():
        if isinstance(module, norm):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.2, 2)
            nn.init.normal_(module.weight, 1, 0.3)
            nn.init.normal_(module.bias)
    return model.to(dtype).eval()


class Backend:
    """aot_eager that remembers the ops of its graphs."""

    def __init__(self):
        self.ops = []

    def __call__(self, graph, inputs):
        def remember(graph, inputs):
            self.ops += [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
            return make_boxed_func(graph.forward)

        return aot_autograd(fw_compiler=remember)(graph, inputs)


@pytest.fixture(autouse=True)
def _kept(device, monkeypatch):
    monkeypatch.setattr(compiled_folding, "LEAST_ELEMENTS", 1)
    _loader.load_library()
    if device.type != "cpu" or not compiled_weights.registered:
        pytest.skip("these kernels keep nothing")
    torch._dynamo.reset()
    compiled_weights.clear()


def image(dims=2, dtype=torch.float32):
    return torch.randn(2, 6, *(9, 7, 5)[:dims], dtype=dtype)


def folds() -> int:
    return sum(kept.folds for entries in compiled_folding._kept.values() for kept in entries)


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_one_op_and_one_fold(dims, bias):
    model = chain(dims, bias)
    backend, fused = Backend(), dsconv_cuda.fuse(model)
    compiled = torch.compile(fused, fullgraph=True, backend=backend)
    x = image(dims)
    for _ in range(3):
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
        assert torch.equal(compiled(x), fused(x))
    assert backend.ops == ["dsconv_cuda.fwd_folded.default"]
    assert folds() == 1


CHANGES = {
    "weight": lambda m: m[0].weight.mul_(2),
    "one element of it": lambda m: m[3].weight[1, 1].add_(1),
    "behind PyTorch": lambda m: m[3].weight.data.mul_(2),
    "statistics": lambda m: m[1].running_mean.add_(1),
    "statistics behind PyTorch": lambda m: m[4].running_var.data.add_(1),
    "bias": lambda m: m[4].bias.fill_(3),
    "other data": lambda m: setattr(m[1].weight, "data", torch.rand(6)),
    "loaded": lambda m: m.load_state_dict(chain().state_dict()),
    "another parameter": lambda m: setattr(m[3], "weight", nn.Parameter(torch.randn(10, 6, 1, 1))),
    "a training step": lambda m: [m.train()(image()), m.eval()],
}


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_noticed(change):
    model = chain()
    compiled, x = torch.compile(dsconv_cuda.fuse(model, inplace=True), backend="aot_eager"), image()
    before = compiled(x)
    CHANGES[change](model)
    after = compiled(x)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, dsconv_cuda.unfuse(model)(x), rtol=1e-4, atol=1e-5)
    assert folds() == (1 if change == "another parameter" else 2)
    dsconv_cuda.clear_weight_cache()
    assert not compiled_folding._kept
    assert torch.equal(compiled(x), after)


def test_where_gradients_are_wanted_the_graph_folds():
    model = chain(dtype=torch.float64)
    backend = Backend()
    compiled = torch.compile(dsconv_cuda.fuse(model), fullgraph=True, backend=backend)
    x = image(dtype=torch.float64).requires_grad_()
    for parameters in (list(model.parameters()), []):  # training, and a frozen model of which x gets a gradient
        if not parameters:
            model.requires_grad_(False)
        y, expected = compiled(x), model(x)
        actual = torch.autograd.grad(y.square().sum(), [x, *parameters])
        torch.testing.assert_close(actual, torch.autograd.grad(expected.square().sum(), [x, *parameters]))
    assert not any("fwd_folded" in name for name in backend.ops)
    assert not compiled_folding._kept


@torch.no_grad()
def test_where_graphs_hold_the_folding_itself():
    model, x = chain(), image()
    fused = dsconv_cuda.fuse(model)
    for strict in (False, True):
        program = torch.export.export(fused, (x,), strict=strict)
        assert not any("folded" in str(node.target) for node in program.graph.nodes)
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)
    backend = Backend()
    with torch.autocast("cpu", torch.bfloat16):
        y = torch.compile(fused, fullgraph=True, backend=backend)(x)
    assert y.dtype == torch.bfloat16
    assert not any("folded" in name for name in backend.ops)


@torch.no_grad()
def test_one_compiled_block_serves_many_weights():
    """Regional compilation: the same graph for blocks alike, each with its own folded weights."""
    models = [chain() for _ in range(3)]
    fused, x = [dsconv_cuda.fuse(model) for model in models], image()
    call = torch.compile(lambda m, x: m(x), backend="aot_eager")
    for _ in range(2):
        for model, other in zip(models, fused, strict=True):
            torch.testing.assert_close(call(other, x), model(x), rtol=1e-4, atol=1e-5)
    assert folds() == 3


@torch.no_grad()
def test_what_is_kept_goes_with_the_weights():
    model = chain()
    torch.compile(dsconv_cuda.fuse(model, inplace=True), backend="aot_eager")(image())
    weight = weakref.ref(model[0].weight)
    assert len(compiled_folding._kept) == 1
    del model
    torch._dynamo.reset()
    gc.collect()
    assert weight() is None
    assert not compiled_folding._kept


@torch.no_grad()
def test_inference_tensors_are_not_kept():
    with torch.inference_mode():
        model, x = chain(), image()
        compiled = torch.compile(dsconv_cuda.fuse(model), backend="aot_eager")
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    assert not compiled_folding._kept


@torch.no_grad()
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_the_op_under_vmap_and_opcheck(dims):
    model, op = chain(dims), torch.ops.dsconv_cuda.fwd_folded
    tensors = [model[0].weight, model[3].weight, model[0].bias, model[3].bias]
    tensors = [t.detach() for t in tensors]
    norms = [[n.running_mean, n.running_var, n.weight.detach(), n.bias.detach()] for n in (model[1], model[4])]
    axes = max(dims, 2)
    padding = [0, 1, 0, 1] if dims == 1 else [1] * 2 * dims
    rest = (*norms, 1e-5, 1e-5, [1] * axes, padding, [1] * axes, 4, 1, [], 0.0, 0)
    x = torch.randn(3, 2, 6, *(9, 7, 5)[:dims])
    batched = torch.func.vmap(lambda x: op(x, *tensors, *rest))(x)
    for i in range(3):
        torch.testing.assert_close(batched[i], model(x[i]), rtol=1e-4, atol=1e-5)
    scales = torch.tensor([1.0, 2.0, 3.0])
    batched = torch.func.vmap(lambda s: op(x[0], tensors[0], tensors[1] * s, *tensors[2:], *rest))(scales)
    for i, s in enumerate(scales):
        other = copy.deepcopy(model)
        other[3].weight.mul_(s)
        torch.testing.assert_close(batched[i], other(x[0]), rtol=1e-4, atol=1e-4)
    before = [norms[0], 1e-5, 4]
    for given in (rest, ([], *rest[1:]), (rest[0], [*norms[1][:2], None, None], *rest[2:]), (*rest[:-3], *before)):
        torch.library.opcheck(op.default, (x[0], *tensors, *given))
