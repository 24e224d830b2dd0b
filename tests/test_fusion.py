"""fuse(), explain_fusion() and unfuse(): what is found, that it computes what it did, and that it can be taken back."""

import copy
import importlib
import io
import pickle
import threading
import time

import pytest
import torch
import torch.nn.functional as F
from fusion_models import (
    MODELS,
    Functional,
    assert_as_precise,
    build,
    calls,
    depthwise,
    image,
    mobilenet_v1,
    pointwise,
    randomized,
    results,
)
from torch import nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import dsconv_cuda
from dsconv_cuda import _loader, explain_fusion, folded, fuse, unfuse
from dsconv_cuda.fusion import measure

pytestmark = [pytest.mark.usefixtures("isa"), pytest.mark.one_isa]

# ---- equal -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients(name, training, device):
    model = build(name, device).train(training)
    fused = fuse(model)
    assert len(explain_fusion(model).taken) == MODELS[name][1]
    assert_as_precise(model, fused, image(device, name=name))


@pytest.mark.parametrize("name", MODELS)
def test_one_operation_a_chain_in_evaluation(name, device):
    model = build(name, device).eval()
    counted = calls(fuse(model), image(device, name=name))
    assert counted.fused == MODELS[name][1]
    before = calls(model, image(device, name=name))
    absorbed = sum(str(f).count("BatchNorm") for f in explain_fusion(model))
    assert (before.fused, before.normalized - counted.normalized) == (0, absorbed)


@pytest.mark.parametrize("name", MODELS)
def test_training_does_without_the_intermediate(name, device):
    """As one operation where there are kernels for statistics of the batch; with neither F.batch_norm nor z."""
    x = image(device, name=name)
    counted = calls(fuse(build(name, device)), x)
    if _loader.batch_norm_kernels_loaded(device.type):
        assert counted.normalized == calls(fuse(build(name, device)).eval(), x).normalized
        assert counted.fused == MODELS[name][1]
    else:
        assert counted.normalized > 0


@pytest.mark.parametrize("cuts", [(1, 2, 6), (2, 3, 6), (2, 4, 6), (1, 4, 6), (5, 6)], ids=str)
def test_reentrant_checkpoints_of_nothing_but_absorbed_modules(cuts, device):
    """A segment that hands on what it is given makes an alias of it."""
    middle = depthwise(), nn.BatchNorm2d(8), nn.ReLU()
    model = randomized(nn.Sequential(*middle, *pointwise(), nn.ReLU())).to(device, torch.float64)
    x = image(device, torch.float64).requires_grad_()
    gradients = []
    for of in (model, fuse(copy.deepcopy(model))):
        y = x
        for begin, end in zip((0, *cuts), cuts, strict=False):
            y = checkpoint(of[begin:end], y, use_reentrant=True)
        y.square().sum().backward()
        gradients.append([p.grad for p in of.parameters()])
    torch.testing.assert_close(*gradients)


def test_transforms_run_what_batchnorm_trains_by_itself(device):
    """torch.func has no rule for statistics of the batch; nn.BatchNorm2d has."""
    model = build("xception", device, torch.float64)
    x = image(device, torch.float64)
    fused = fuse(model)
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    buffers = {n: b.clone() for n, b in model.named_buffers()}

    def gradients(module):
        def loss(parameters):
            state = {**parameters, **{n: b.clone() for n, b in buffers.items()}}
            return torch.func.functional_call(module, state, (x,)).square().sum()

        return torch.func.grad(loss)(parameters)

    torch.testing.assert_close(gradients(fused), gradients(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype, device):
    # No ReLU: in 16 bits a value near a kink falls to either side, and its gradient with it.
    model = randomized(nn.Sequential(depthwise(), nn.BatchNorm2d(8), nn.SiLU(), *pointwise())).to(device, dtype).eval()
    if dtype == torch.float64:
        x = image(device, dtype)
        torch.testing.assert_close(results(fuse(model), x), results(model, x))
    else:
        assert_as_precise(model, fuse(model), image(device, dtype))


def test_autocast(device):
    model = build("mobilenet_v1", device).eval()
    with torch.autocast(device.type, torch.bfloat16), torch.no_grad():
        x = image(device)
        y, expected = fuse(model)(x), model(x)
        exact = copy.deepcopy(model).double()(x.double())
    assert y.dtype == expected.dtype
    assert torch.linalg.vector_norm(y - exact) <= 2 * torch.linalg.vector_norm(expected - exact)


@pytest.mark.parametrize("name", ["mobilenet_v1", "quartznet", "x3d"])
def test_training_under_autocast_with_a_grad_scaler(name, device):
    model, x = build(name, device), image(device, name=name)
    fused, scaler = fuse(copy.deepcopy(model)), torch.amp.GradScaler(device.type)
    optimizer = torch.optim.SGD(fused.parameters(), lr=0.01)
    with torch.autocast(device.type, torch.bfloat16):
        y, expected = fused(x), model(x)
    assert y.dtype == expected.dtype
    for ours, theirs in zip(fused.buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)
    before = [p.detach().clone() for p in fused.parameters()]
    scaler.scale(y.float().square().mean()).backward()
    scaler.step(optimizer)
    assert all(not torch.equal(p, old) for p, old in zip(fused.parameters(), before, strict=True))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_tied_parameters_and_modules(dims, device):
    """Parameters that two chains share get the gradients of both, and stay shared in copies; a norm that two chains
    share stays out of either."""
    conv, norm = getattr(nn, f"Conv{dims}d"), getattr(nn, f"BatchNorm{dims}d")

    def layers(bn):
        return conv(8, 8, 3, padding=1, groups=8), bn, nn.SiLU(), conv(8, 8, 1)

    model = nn.Sequential(*layers(norm(8)), *layers(norm(8))).to(device, torch.float64)
    model[4].weight, model[7].weight = model[0].weight, model[3].weight
    fused, x = fuse(model), torch.randn(2, 8, *(9, 7, 5)[:dims], device=device, dtype=torch.float64)
    assert len(explain_fusion(fused).taken) == 2
    for actual, expected in zip(results(fused, x)[:3], results(model, x)[:3], strict=True):
        torch.testing.assert_close(actual, expected)
    copied = copy.deepcopy(fused)
    assert copied[4].weight is copied[0].weight is not fused[0].weight
    shared = norm(8)
    assert not explain_fusion(nn.Sequential(*layers(shared), *layers(shared))).taken


@pytest.mark.parametrize("name", ["mobilenet_v1", "quartznet", "x3d", "functional_volume"])
def test_functional_call_with_other_parameters_and_buffers(name, device):
    model, x = build(name, device).eval(), image(device, name=name)
    fused, other = fuse(model), build(name, device).state_dict()
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            fused(x)  # what it keeps is of its own weights
            actual, expected = (torch.func.functional_call(m, other, (x,)) for m in (fused, model))
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("frozen", [("1",), ("4",)])
def test_one_batch_norm_in_evaluation(frozen, device):
    """Fine-tuning with frozen statistics."""
    model = build("mobilenet_v1", device).train()
    for name in frozen:
        model.get_submodule(name).eval()
    fused = fuse(model)
    assert_as_precise(model, fused, image(device))
    assert calls(fused, image(device)).fused == int(_loader.batch_norm_kernels_loaded(device.type))


@pytest.mark.parametrize("name", ["conformer", "x3d"])
def test_folded_weights_are_kept_in_every_dimension(name, device):
    """Folded once, and again after a change."""
    model = build(name, device).eval()
    fused, x = fuse(model), image(device, name=name)
    again = {"conformer": lambda m: m.layers[3], "x3d": lambda m: m.c[1]}[name](fused)
    for _ in range(3):
        torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)
        assert calls(fused, x).fused == 1
        with torch.no_grad():
            again.weight.mul_(1.5)


def test_unbatched_rows_before_a_norm_raise(device):
    """nn.BatchNorm1d would take [C, L] for C images with L channels; L = C is where that goes through."""
    norms = nn.Sequential(nn.Conv1d(8, 8, 3, padding=1, groups=8), nn.BatchNorm1d(8), nn.Conv1d(8, 4, 1)).to(device)
    for model in (fuse(norms.eval()), fuse(copy.deepcopy(norms).train())):
        with pytest.raises(ValueError, match=r"3D|\[N, C, L\]"):
            model(torch.randn(8, 8, device=device))
    plain = nn.Sequential(nn.Conv1d(8, 8, 3, padding=1, groups=8), nn.Conv1d(8, 4, 1)).to(device)
    x = torch.randn(8, 20, device=device)
    torch.testing.assert_close(fuse(plain)(x), plain(x), rtol=1e-4, atol=1e-5)


# ---- follows what changes --------------------------------------------------------------------------------------------


def _train_a_step(model, x):
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize(
    "change",
    [
        _train_a_step,
        lambda model, x: model.train()(x),  # the statistics alone
        lambda model, x: model.load_state_dict(build("mobilenet_v1", x.device).state_dict()),
        lambda model, x: model.to(torch.float64).to(torch.float16).to(torch.float32),
        lambda model, x: setattr(model[3], "weight", nn.Parameter(torch.ones_like(model[3].weight))),
        lambda model, x: model[1].running_mean.fill_(3),
        lambda model, x: setattr(model[4], "eps", 0.5),
        lambda model, x: model[1].bias.requires_grad_(False).fill_(3),
        lambda model, x: setattr(model[0], "padding", (0, 0)),
        lambda model, x: [p.data.mul_(1.5) for p in model.parameters()],  # not counted by PyTorch, as some EMAs do it
        lambda model, x: model[3].weight.data[2:3].fill_(9),
        lambda model, x: setattr(model[1].weight, "data", torch.ones_like(model[1].weight)),
    ],
    ids=[
        "step",
        "statistics",
        "load",
        "to",
        "exchange",
        "buffer",
        "eps",
        "write",
        "padding",
        "data",
        "row",
        "other data",
    ],
)
def test_folded_weights_follow(change, device):
    model = build("mobilenet_v1", device).eval()
    fused = fuse(model)
    x = image(device)
    with torch.no_grad():
        before = fused(x)
    change(fused, x)
    fused.eval()
    expected = unfuse(fused)
    with torch.no_grad():
        after = fused(x)
        assert before.shape != after.shape or not torch.allclose(before, after)
        torch.testing.assert_close(after, expected(x), rtol=1e-4, atol=1e-5)
        assert calls(fused, x).fused == 1


def test_hooks_that_come_later_are_called(device):
    model = build("mobilenet_v1", device).eval()
    fused = fuse(model)
    seen = []
    handle = fused[1].register_forward_hook(lambda module, inputs, output: seen.append(output.clone()))
    x = image(device)
    assert torch.equal(fused(x), model(x))
    assert torch.equal(seen[0], model[1](model[0](x)))
    assert "was changed" in explain_fusion(fused)[0].reason
    handle.remove()
    assert calls(fused, x).fused == 1


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_hooks_on_what_holds_a_part_of_a_chain_see_its_value(training, compiled, device):
    """As torchvision's Conv2dNormActivation does; the chain is one operation again when they are gone."""
    torch._dynamo.reset()
    model = build("mobilenet_v2", device).train(training)
    fused, x = fuse(copy.deepcopy(model)), image(device)
    seen, expected_seen = [], []
    hook = fused.conv[1].register_forward_hook(_hooked(seen))
    assert "one by one" in explain_fusion(fused)[0].reason
    model.conv[1].register_forward_hook(_hooked(expected_seen))
    assert "hooks are attached to the Sequential around a part" in explain_fusion(model)[0].reason
    call = torch.compile(fused, backend="eager") if compiled else fused
    torch.testing.assert_close(call(x), model(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(seen, expected_seen, rtol=1e-4, atol=1e-4)
    hook.remove()
    model.conv[1]._forward_hooks.clear()
    torch.testing.assert_close(call(x), model(x), rtol=1e-4, atol=1e-4)
    assert calls(fused.eval(), x).fused == 1
    torch._dynamo.reset()


class OwnActivation(nn.Module):
    def __init__(self, kind="silu"):
        super().__init__()
        self.kind = kind

    def forward(self, x, inplace=False):
        return F.silu(x, inplace) if self.kind == "silu" else torch.tanh(x)


class OwnReLU(nn.ReLU):
    def forward(self, input):
        return torch.relu(input)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("activation", "change"),
    [
        (nn.ReLU, lambda m: setattr(m[0], "padding_mode", "circular")),
        (nn.LeakyReLU, lambda m: setattr(m[2], "negative_slope", 0.3)),
        (nn.GELU, lambda m: setattr(m[2], "approximate", "tanh")),
        (OwnActivation, lambda m: setattr(m[2], "kind", "tanh")),
        (lambda: nn.Dropout(0.0), lambda m: setattr(m[2], "p", 1.0)),
        (nn.ReLU, lambda m: setattr(m[0], "forward", lambda x: x + 1)),
        (nn.ReLU, lambda m: setattr(m[2], "forward", lambda x: x + 1)),
        (nn.ReLU, lambda m: setattr(m[4], "forward", lambda x: x + 1)),
    ],
    ids=["padding", "slope", "approximate", "own", "dropout", "depthwise", "activation", "norm"],
)
def test_settings_and_forwards_that_come_later(activation, change, training, compiled, device):
    torch._dynamo.reset()
    model = randomized(nn.Sequential(depthwise(), nn.BatchNorm2d(8), activation(), *pointwise())).to(device)
    fused, x = fuse(copy.deepcopy(model.train(training))), image(device)
    call = torch.compile(fused, backend="eager") if compiled else fused
    torch.testing.assert_close(call(x), model(x), rtol=1e-4, atol=1e-4)
    change(model), change(fused)
    torch.testing.assert_close(call(x), model(x), rtol=1e-4, atol=1e-4)
    assert "one by one" in explain_fusion(fused)[0].reason
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", [OwnActivation, OwnReLU])
def test_activations_of_other_classes(kind, device):
    model = randomized(nn.Sequential(depthwise(), nn.BatchNorm2d(8), kind(), *pointwise(), kind())).to(device).eval()
    fused, x = fuse(model), image(device)
    torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)
    assert calls(fused, x).fused == 1
    name = "silu" if kind is OwnActivation else "relu"
    reason = f"depthwise -> BatchNorm -> {name} -> pointwise -> BatchNorm -> {name}"
    assert explain_fusion(model)[0].reason == explain_fusion(fused)[0].reason == reason
    assert isinstance(fused[2], kind)
    assert type(unfuse(fused)[2]) is kind
    assert calls(pickle.loads(pickle.dumps(fused)), x).fused == 1


def test_a_rewritten_forward_gives_way_too(device):
    model = build("functional", device).eval()
    fused = fuse(model)
    x = image(device)
    assert all("another forward of Functional" in finding.reason for finding in explain_fusion(model))
    assert isinstance(fused, Functional)
    seen = []
    handle = fused.bn1.register_forward_hook(lambda module, inputs, output: seen.append(output.clone()))
    assert torch.equal(fused(x), model(x))
    assert torch.equal(seen[0], model.bn1(model.dw1(x)))
    handle.remove()
    assert calls(fused, x).fused == 2
    assert type(unfuse(fused)) is Functional
    assert calls(unfuse(fused), x).fused == 0
    traced = torch.fx.symbolic_trace(fused)
    assert torch.equal(traced(x), model(x))


@torch.no_grad()
@pytest.mark.parametrize("name", ["mobilenet_v2", "quartznet", "x3d", "xception"])
def test_a_fused_model_can_be_traced(name, device):
    """By torch.fx, into calls of the modules that the original's graph has; the result is fused as well."""
    model, x = build(name, device).eval(), image(device, name=name)
    fused = fuse(model)
    traced, original = torch.fx.symbolic_trace(fused), torch.fx.symbolic_trace(model)
    assert [(n.op, n.target) for n in traced.graph.nodes] == [(n.op, n.target) for n in original.graph.nodes]
    assert torch.equal(traced(x), fused(x))
    assert calls(traced, x).fused == MODELS[name][1]


def test_parametrization_and_pruning_that_come_later(device):
    x = image(device)
    for change in (
        nn.utils.parametrizations.weight_norm,
        lambda module: prune.random_unstructured(module, "weight", 0.5),
    ):
        fused = fuse(build("mobilenet_v1", device).eval())
        change(fused[3])
        counted = calls(fused, x)
        assert (counted.fused, counted.normalized) == (0, 2)
    fused = fuse(build("mobilenet_v1").eval())
    nn.utils.parametrizations.weight_norm(fused[0])
    with pytest.raises(RuntimeError, match="parametrizations"):
        unfuse(fused, inplace=True)


def test_a_module_that_is_exchanged_later_is_computed(device):
    model = build("mobilenet_v1", device).eval()
    fused = fuse(model)
    fused = nn.SyncBatchNorm.convert_sync_batchnorm(fused)
    x = image(device)
    torch.testing.assert_close(fused(x), model(x))
    assert calls(fused, x).fused == 0
    other = fuse(model)
    other[2] = nn.SiLU()
    torch.testing.assert_close(other(x), nn.Sequential(*model[:2], nn.SiLU(), *model[3:])(x))


OTHER_WAY = "whose first module computes all of it, and was given something else"


@pytest.mark.parametrize("mode", ["eval", "inference", "train", "compiled", "compiled train"])
@pytest.mark.parametrize("kind", ["attribute", "attribute in place"])
def test_another_way_through_a_chain_is_never_silent(kind, mode, device):
    torch._dynamo.reset()
    if mode == "inference" and kind == "attribute in place":
        pytest.skip("tensors of inference mode do not count writes")
    if "compiled" in mode and kind == "attribute in place":
        pytest.skip("a graph does not count writes")
    model = randomized(Optional(kind)).to(device, torch.float64).train("train" in mode)
    fused, x = fuse(copy.deepcopy(model)), image(device, torch.float64)
    call = torch.compile(fused, backend="eager") if "compiled" in mode else fused
    with torch.inference_mode(mode == "inference"), torch.set_grad_enabled("train" in mode):
        torch.testing.assert_close(call(x), model(x))
        model.switched = fused.switched = True
        with pytest.raises(RuntimeError, match=OTHER_WAY):
            call(x)
        torch.testing.assert_close(unfuse(fused)(x), model(x))
        fused.switched = model.switched = False
        torch.testing.assert_close(call(x), model(x))
    torch._dynamo.reset()


@torch.no_grad()
def test_a_model_that_begins_within_a_chain_raises(device):
    model = build("mobilenet_v1", device).eval()
    fused, x = fuse(model), image(device)
    result = fused[:2](x)  # what the chain makes, which the rest hands on
    torch.testing.assert_close(fused[2:](result), model(x), rtol=1e-4, atol=1e-5)
    for rest in (fused[2:], fused[3:], fused[4:], copy.deepcopy(fused)[2:]):
        with pytest.raises(RuntimeError, match=OTHER_WAY):
            rest(result.clone())
    hook = fused[2].register_forward_hook(lambda *_: None)  # one by one
    z = model[:2](x)
    torch.testing.assert_close(fused[2:](z), model[2:](z))
    hook.remove()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("cut", [1, 2, 4])
@pytest.mark.parametrize("compiled", ["head", "tail", "both"])
def test_parts_of_a_chain_that_are_compiled_by_themselves(compiled, cut, training, device):
    torch._dynamo.reset()
    model = build("mobilenet_v1", device, torch.float64).train(training)
    fused, x = fuse(copy.deepcopy(model)), image(device, torch.float64)
    parts = [fused[:cut], fused[cut:]]
    for i, name in enumerate(("head", "tail")):
        if compiled in (name, "both"):
            parts[i] = torch.compile(parts[i], backend="eager")
    with torch.set_grad_enabled(training):
        for _ in range(2):
            torch.testing.assert_close(parts[1](parts[0](x)), model(x))
    torch._dynamo.reset()


@pytest.mark.parametrize("training", [False, True])
def test_a_chain_in_a_checkpoint_compiles_to_one_graph(training, device):
    torch._dynamo.reset()
    model = build("mobilenet_v2", device, torch.float64).train(training)
    fused, x = fuse(copy.deepcopy(model)), image(device, torch.float64)

    def checkpointed(x):
        return checkpoint(fused, x, use_reentrant=False)

    y = torch.compile(checkpointed, fullgraph=True, backend="aot_eager")(x.requires_grad_())
    torch.testing.assert_close(y, model(x))
    dy = torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, x, dy), torch.autograd.grad(model(x), x, dy))
    torch._dynamo.reset()


# ---- a good citizen --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_state_dict_is_that_of_the_original(name):
    model = build(name)
    fused = fuse(model)
    assert list(fused.state_dict()) == list(model.state_dict())
    other = build(name)
    other.load_state_dict(fused.state_dict())
    fused.load_state_dict(build(name).state_dict())
    assert all(p is q for p, q in zip(fused.parameters(), model.parameters(), strict=True))
    assert all(p is q for p, q in zip(fused.buffers(), model.buffers(), strict=True))
    assert [n for n, _ in fused.named_modules()] == [n for n, _ in model.named_modules()]
    assert all(isinstance(f, type(m)) for f, m in zip(fused.modules(), model.modules(), strict=True))


def test_inplace_and_not():
    model = build("mobilenet_v2")
    classes = [type(m) for m in model.modules()]
    fused = fuse(model)
    assert [type(m) for m in model.modules()] == classes
    assert fuse(model, inplace=True) is model
    assert [type(m) for m in model.modules()] == [type(m) for m in fused.modules()] != classes
    assert [type(m) for m in unfuse(fused).modules()] == classes
    assert [type(m) for m in fused.modules()] != classes
    assert unfuse(model, inplace=True) is model
    assert [type(m) for m in model.modules()] == classes
    assert not any("_fused_chain" in vars(m) for m in model.modules())


def test_fusing_twice_changes_nothing():
    model = build("mobilenet_v2").eval()
    fused = fuse(fuse(model))
    assert calls(fused, image()).fused == 1
    assert [f.name for f in explain_fusion(fused).taken] == ["conv.1.0"]


def _saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), _saved])
@pytest.mark.parametrize("name", ["mobilenet_v2", "functional", "quartznet", "functional_volume"])
def test_copies_are_fused_and_share_nothing(name, copied):
    fused = fuse(build(name).eval())
    x = image(name=name)
    with torch.no_grad():
        expected = fused(x)
        other = copied(fused)
        assert torch.equal(other(x), expected)
        for p in other.parameters():
            p.zero_()
        assert torch.equal(fused(x), expected)
    assert calls(other, x).fused == MODELS[name][1]
    assert not {id(m) for m in other.modules()} & {id(m) for m in fused.modules()}


def test_repr_tells_the_chain():
    fused = fuse(build("mobilenet_v1"))
    assert "FusedConv2d(8, 8, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), groups=8, bias=False" in repr(fused)
    assert "-> bn -> relu6 -> 1x1 to 12 -> bn -> relu6" in repr(fused)
    assert "AbsorbedBatchNorm2d" in repr(fused)


def test_functional_call_and_per_sample_gradients(device):
    model = build("mobilenet_v1", device, torch.float64).eval()
    x = image(device, torch.float64)

    def per_sample(module):
        def loss(parameters, image):
            return torch.func.functional_call(module, parameters, (image[None],)).square().sum()

        parameters = dict(module.named_parameters())
        return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)

    torch.testing.assert_close(per_sample(fuse(model)), per_sample(model))
    doubled = {name: 2 * p for name, p in model.named_parameters()}
    fused = fuse(model)
    fused(x)
    torch.testing.assert_close(
        torch.func.functional_call(fused, doubled, (x,)), torch.func.functional_call(model, doubled, (x,))
    )


@pytest.mark.parametrize(
    ("name", "training"),
    [(name, training) for name in ("mobilenet_v2", "functional", "quartznet", "x3d") for training in (False, True)],
)
def test_compiles_to_one_graph(name, training, device):
    model = build(name, device).train(training)
    compiled = torch.compile(fuse(model), fullgraph=True, backend="aot_eager")
    x = image(device, name=name)
    y = compiled(x)
    y.sum().backward()
    torch.testing.assert_close(y, copy.deepcopy(model)(x), rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


def _hooked(seen):
    return lambda module, inputs, output: seen.append(output)


@torch.no_grad()
@pytest.mark.parametrize("name", ["mobilenet_v1", "x3d", "functional_inside"])
def test_compiled_graphs_see_what_changes_later(name, device):
    """A hook on a module of a chain, and an exchanged module, before the first call of a graph and after it."""
    torch._dynamo.reset()
    model, x = build(name, device).eval(), image(device, name=name)
    (finding, *_) = explain_fusion(model)
    norm = finding.members[finding.members.index(finding.name) + 1]
    for called_before in (False, True):
        for change in ("hook", "exchange"):
            fused, other, seen = fuse(model), copy.deepcopy(model), []
            compiled = torch.compile(fused, backend="eager")
            if called_before:
                torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
            for changed in (fused, other):
                if change == "hook":
                    changed.get_submodule(norm).register_forward_hook(_hooked(seen))
                else:
                    parent, _, child = norm.rpartition(".")
                    setattr(changed.get_submodule(parent), child, nn.Identity())
            torch.testing.assert_close(compiled(x), other(x), rtol=1e-4, atol=1e-5)
            if change == "hook":
                torch.testing.assert_close(seen[0], seen[1], rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


def test_meta_and_to_empty():
    fused = fuse(build("mobilenet_v1").to("meta").eval())
    for training in (True, False):
        assert fused.train(training)(torch.empty(2, 8, 19, 21, device="meta")).shape == (2, 12, 10, 11)
    fused = fused.to_empty(device="cpu")
    model = build("mobilenet_v1").eval()
    fused.load_state_dict(model.state_dict())
    x = image()
    torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)


def test_several_threads(device, monkeypatch):
    fold = folded.fold

    def slow_fold(*arguments):
        time.sleep(0.02)  # the others arrive while the first one folds
        return fold(*arguments)

    monkeypatch.setattr(folded, "fold", slow_fold)
    fused = fuse(build("mobilenet_v1", device).eval())
    images = [image(device) for _ in range(4)]
    with torch.no_grad():
        expected = [unfuse(fused)(x) for x in images]
    actual = [None] * 4

    def run(i):
        with torch.no_grad():
            for _ in range(10):
                actual[i] = fused(images[i])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


# ---- explained -------------------------------------------------------------------------------------------------------


class SqueezeExcite(nn.Module):
    def __init__(self):
        super().__init__()
        self.before, self.gate = nn.Sequential(depthwise(), nn.BatchNorm2d(8), nn.SiLU()), nn.Conv2d(8, 8, 1)
        self.after = nn.Conv2d(8, 4, 1)

    def forward(self, x):
        x = self.before(x)
        return self.after(x * self.gate(F.adaptive_avg_pool2d(x, 1)).sigmoid())


class ConvNext(nn.Module):
    def __init__(self):
        super().__init__()
        self.depthwise, self.norm, self.linear = depthwise(kernel=7, bias=True), nn.LayerNorm(8), nn.Linear(8, 16)

    def forward(self, x):
        return self.linear(self.norm(self.depthwise(x).permute(0, 2, 3, 1)))


class UsedTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.depthwise, self.pointwise = depthwise(), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        z = self.depthwise(x)
        return self.pointwise(z) + z


class CalledTwice(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.block = module

    def forward(self, x):
        return self.block(self.block(x))


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.depthwise, self.other = depthwise(), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return self.other(x)


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.depthwise, self.pointwise = depthwise(), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return self.pointwise(self.depthwise(x)) if x.sum() > 0 else x


class OtherWay(nn.Module):
    """Drops its activation in evaluation."""

    def __init__(self):
        super().__init__()
        self.depthwise, self.relu, self.pointwise = depthwise(), nn.ReLU(), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        x = self.depthwise(x)
        return self.pointwise(self.relu(x) if self.training else x)


class Applied(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function, self.depthwise, self.pointwise = function, depthwise(), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return self.pointwise(self.function(self.depthwise(x)))


class OptionalArgument(nn.Module):
    def __init__(self):
        super().__init__()
        self.depthwise, self.pointwise = depthwise(), nn.Conv2d(8, 8, 1)

    def forward(self, x, scale=None):
        x = self.pointwise(self.depthwise(x).relu())
        return x if scale is None else x * scale


class Optional(nn.Module):
    """The convolution module of a Conformer as it is often written, and what else arguments with a default do."""

    def __init__(self, kind: str = ""):
        super().__init__()
        self.kind, self.switched = kind, False
        self.depthwise, self.norm, self.act, (self.pointwise, self.norm2) = (
            depthwise(),
            nn.BatchNorm2d(8),
            nn.SiLU(),
            pointwise(),
        )

    def middle(self, x, given):
        if self.kind == "mask" and given is not None:
            x = x.masked_fill(given, 0.0)
        if self.kind == "in place" and given is not None:
            x.masked_fill_(given, 0.0)
        if self.kind == "flag" and given:
            x = x * 2
        if self.kind == "attribute" and self.switched:
            x = x + 1
        if self.kind == "attribute in place" and self.switched:
            x += 1
        return x

    def forward(self, x):
        return self.rest(self.middle(self.depthwise(x), None))

    def rest(self, x):
        return self.norm2(self.pointwise(self.act(self.norm(x))))


class Masked(Optional):
    def forward(self, x, given=None):
        return self.rest(self.middle(self.depthwise(x), given))


class Flagged(Optional):
    def forward(self, x, given=False, scale=1.0):
        return self.rest(self.middle(self.depthwise(x), given)) * scale


class Headless(Optional):
    def forward(self, x, features_only=False):
        features = self.act(self.norm(self.depthwise(x)))
        return features if features_only else self.norm2(self.pointwise(features))


class Passes(nn.Module):
    """The optional argument is passed on; the model is deep and does what cannot be traced with one."""

    def __init__(self):
        super().__init__()
        self.block = Masked("mask")

    def forward(self, x, mask=None):
        if mask is not None and mask.sum() > 1e9:
            return x
        return self.block(x, mask)


class OwnMish(nn.Module):
    def forward(self, x):
        return F.mish(x)


class OwnRow(nn.Conv1d):
    pass


class OwnConv(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def sequential(*between, conv=None, after=None):
    return nn.Sequential(conv or depthwise(), *between, after or nn.Conv2d(8, 4, 1))


def changed(module, change):
    change(module)
    return module


LEFT = {
    "squeeze-excite": (SqueezeExcite, "squeeze-excite between"),
    "layer norm": (ConvNext, "LayerNorm between"),
    "result used twice": (UsedTwice, "used 2 times"),
    "called twice": (lambda: CalledTwice(sequential(after=nn.Conv2d(8, 8, 1))), "called 2 times"),
    "unused": (Unused, "does not call it"),
    "untraceable": (Untraceable, "cannot be traced"),
    "mask": (
        lambda: Masked("mask"),
        "masked_fill() between it and the 1x1 convolution, where forward of Masked is given",
    ),
    "mask in place": (lambda: Masked("in place"), "is given 'given'"),
    "flag": (lambda: Flagged("flag"), "mul() between it and the 1x1 convolution, where forward of Flagged is given"),
    "features": (Headless, "where forward of Headless is given 'features_only'"),
    "mask from outside": (Passes, "where forward of block is given 'given'"),
    "optional argument": (OptionalArgument, "forward of OptionalArgument cannot be rewritten: it takes arguments"),
    "slope of a function": (lambda: Applied(lambda x: F.leaky_relu(x, 0.2)), "leaky_relu() between"),
    "function": (lambda: Applied(F.mish), "mish() between"),
    "another way": (OtherWay, "different ways"),
    "own class": (lambda: sequential(conv=OwnConv(8, 8, 3, groups=8)), "OwnConv may compute something else"),
    "padding mode": (lambda: sequential(conv=depthwise(padding_mode="reflect")), "padding_mode 'reflect'"),
    "activation": (lambda: sequential(nn.PReLU()), "PReLU(num_parameters=1) is no activation"),
    "slope": (lambda: sequential(nn.LeakyReLU(0.2)), "is no activation of the kernels"),
    "dropout": (lambda: sequential(nn.Dropout()), "Dropout between"),
    "own activation": (lambda: sequential(OwnMish()), "mish() between"),
    "own forward": (
        lambda: changed(sequential(nn.ReLU()), lambda m: setattr(m[1], "forward", torch.sin)),
        "the ReLU has a forward of its own",
    ),
    "two activations": (lambda: sequential(nn.ReLU(), nn.ReLU()), "ReLU between"),
    "instance norm": (lambda: sequential(nn.InstanceNorm2d(8)), "InstanceNorm2d between"),
    "no statistics": (lambda: sequential(nn.BatchNorm2d(8, track_running_stats=False)), "without running statistics"),
    "3x3": (lambda: sequential(after=nn.Conv2d(8, 4, 3)), "3x3, not 1x1"),
    "grouped": (lambda: sequential(after=nn.Conv2d(8, 4, 1, groups=2)), "2 groups"),
    "strided": (lambda: sequential(after=nn.Conv2d(8, 4, 1, stride=2)), "strided"),
    "padded": (lambda: sequential(after=nn.Conv2d(8, 4, 1, padding=1)), "pads"),
    "depthwise again": (lambda: sequential(after=depthwise()), "another depthwise"),
    "last": (lambda: nn.Sequential(depthwise()), "nothing follows"),
    "hook": (lambda: changed(sequential(), lambda m: m[0].register_forward_hook(print)), "hooks are attached"),
    "hook after": (
        lambda: changed(sequential(nn.ReLU()), lambda m: m[1].register_full_backward_hook(print)),
        "hooks are attached to the ReLU",
    ),
    "parametrized": (
        lambda: changed(sequential(), lambda m: nn.utils.parametrizations.spectral_norm(m[1])),
        "parametrized",
    ),
    "pruned": (
        lambda: changed(sequential(), lambda m: prune.l1_unstructured(m[0], "weight", 2)),
        "hooks are attached",
    ),
    "own class in 1-D": (
        lambda: sequential(conv=OwnRow(8, 8, 3, groups=8), after=nn.Conv1d(8, 4, 1)),
        "OwnRow may compute something else than nn.Conv1d",
    ),
    "norm of other dimensions": (
        lambda: sequential(nn.BatchNorm2d(8), conv=nn.Conv1d(8, 8, 3, groups=8), after=nn.Conv1d(8, 4, 1)),
        "BatchNorm2d between",
    ),
    "convolution of other dimensions": (
        lambda: sequential(conv=nn.Conv3d(8, 8, 3, groups=8)),
        "the convolution after it is a Conv2d",
    ),
    "3x3x3": (
        lambda: sequential(conv=nn.Conv3d(8, 8, 3, groups=8), after=nn.Conv3d(8, 4, 3)),
        "3x3x3, not 1x1x1",
    ),
    "padded in 3-D": (
        lambda: sequential(conv=nn.Conv3d(8, 8, 3, groups=8), after=nn.Conv3d(8, 4, 1, padding=(0, 0, 1))),
        "pads",
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_and_why(name):
    build, words = LEFT[name]
    model = build()
    explanation = explain_fusion(model)
    assert not explanation.taken
    assert words in explanation[0].reason
    assert explanation[0].reason in str(explanation)
    assert [type(m) for m in fuse(model).modules()] == [type(m) for m in model.modules()]


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda x: F.relu(x, inplace=True), "relu"),
        (lambda x: x.relu_(), "relu"),
        (lambda x: F.leaky_relu(x, negative_slope=0.01), "leaky_relu"),
        (lambda x: F.gelu(x, approximate="tanh"), "gelu_tanh"),
        (lambda x: F.hardswish(input=x), "hardswish"),
        (torch.sigmoid, "sigmoid"),
    ],
)
def test_activations_as_functions(function, name):
    model = Applied(function)
    assert f"-> {name} ->" in explain_fusion(model)[0].reason
    x = image()
    torch.testing.assert_close(fuse(model)(x), model(x), rtol=1e-4, atol=1e-5)
    assert calls(fuse(model), x).fused == 1


def test_what_is_taken():
    (finding,) = explain_fusion(build("mobilenet_v2"))
    assert (finding.name, finding.taken) == ("conv.1.0", True)
    before, chain = ("conv.0.1", "conv.0.2"), ("conv.1.0", "conv.1.1", "conv.1.2", "conv.2", "conv.3")
    assert finding.members == before + chain
    assert finding.reason == "BatchNorm -> relu6 -> depthwise -> BatchNorm -> relu6 -> pointwise -> BatchNorm"
    assert str(explain_fusion(build("shufflenet"))).startswith("2 of 2 depthwise convolutions")


def test_a_dropout_of_nothing_is_no_obstacle(device):
    model = sequential(nn.ReLU(), nn.Dropout2d(0.0)).to(device)
    fused, x = fuse(model), image(device)
    torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)
    assert calls(fused, x).fused == 1


def test_arguments_of_other_types_raise():
    model, x = build("mobilenet_v1").eval(), image()
    for function in (fuse, unfuse, explain_fusion):
        with pytest.raises(TypeError, match=f"{function.__name__}: model must be an nn.Module, got function"):
            function(lambda x: x)
        with pytest.raises(TypeError, match=r"fuse before torch\.jit"):
            function(torch.jit.trace(model, x))
    for function in (fuse, explain_fusion):
        for example, kind in (([x], "list"), ({"x": x}, "dict")):
            with pytest.raises(TypeError, match=f"example_input must be a tensor, or a tuple .* got {kind}"):
                function(model, example_input=example)


def test_the_chain_ends_where_something_does_not_fit():
    """What follows the pointwise convolution stays outside: hooks, a result that is used twice, another activation."""
    for tail, members in (
        ([nn.BatchNorm2d(4), nn.PReLU()], 3),
        ([nn.PReLU()], 2),
        ([changed(nn.BatchNorm2d(4), lambda m: m.register_forward_pre_hook(lambda *_: None))], 2),
        ([nn.ReLU(), nn.ReLU()], 3),
    ):
        model = nn.Sequential(*sequential(), *tail).eval()
        assert len(explain_fusion(model)[0].members) == members
        x = image()
        torch.testing.assert_close(fuse(model)(x), model(x), rtol=1e-4, atol=1e-5)


def test_fused_modules_are_listed_and_left_alone():
    kinds = ("Conv1d", "Conv2d", "Conv3d", "ConvBN1d", "ConvBN2d", "ConvBN3d")
    every = nn.ModuleList(getattr(dsconv_cuda, f"DepthwiseSeparable{kind}")(3, 4, 3) for kind in kinds)
    assert [finding.reason for finding in explain_fusion(every)] == 6 * ["a fused module by itself"]
    model = dsconv_cuda.models.xception()
    explanation = explain_fusion(model)
    assert len(explanation.taken) == 34
    assert not explanation.left
    assert [type(m) for m in fuse(model).modules()] == [type(m) for m in model.modules()]


def test_explaining_changes_nothing():
    model = build("switched").train()
    model.block[1].eval()
    modes, classes = ([f(m) for m in model.modules()] for f in (lambda m: m.training, type))
    explain_fusion(model)
    assert [m.training for m in model.modules()] == modes
    assert [type(m) for m in model.modules()] == classes


class Remembers(nn.Module):
    """Whose forward changes it in every way that a module of plain Python can be changed."""

    def __init__(self, traceable: bool):
        super().__init__()
        self.block, self.traceable = mobilenet_v1(), traceable
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("noise", torch.zeros(3))
        self.scale, self.cached, self.count = torch.ones(2), None, 0
        self.log, self.by_name, self.seen = [], {"lists": [[]]}, set()

    def forward(self, x):
        self.count += 1
        self.steps += 1
        self.noise.normal_()
        self.scale.mul_(2)
        self.log.append(x)
        self.by_name["lists"][0].append(x)
        self.by_name["x"] = x
        self.seen.add(self.count)
        self.extra = nn.ReLU()
        y = self.block(x)
        if not self.traceable and x.sum() > 0:
            return y
        if self.cached is None:
            self.cached = y.mean((2, 3))
        return y + self.cached[:, :, None, None]


@pytest.mark.parametrize("traceable", [True, False])
@pytest.mark.parametrize("what", ["explain", "fuse", "inplace", "measure", "table"])
def test_looking_at_a_model_leaves_no_traces(what, traceable, monkeypatch):
    timed(monkeypatch, 0.5)
    model, x = randomized(Remembers(traceable)).eval(), image()
    expected = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    if what == "explain":
        explain_fusion(model)
    elif what == "table":
        if not traceable:
            pytest.skip("meta tensors have no values")
        dsconv_cuda.complexity.table(model, x.shape)
    else:
        example = {"example_input": x} if what == "measure" else {}
        fused = fuse(model, inplace=what == "inplace", **example)
    assert torch.equal(torch.get_rng_state(), random)
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name])
    # A plain tensor is given back where nothing has been computed for real.
    assert what == "measure" or model.scale.tolist() == [1, 1]
    assert (model.cached, model.count, model.log, model.seen) == (None, 0, [], set())
    assert model.by_name == {"lists": [[]]}
    assert "extra" not in model._modules
    pickle.dumps(model)
    if what in ("fuse", "inplace", "measure"):
        assert calls(copy.deepcopy(fused), x).fused == 1


# ---- where it would be slower ----------------------------------------------------------------------------------------


def timed(monkeypatch, *ratios):
    """Has what is measured take that much longer as one operation, in turn, and checks that both ways are the same."""
    left = list(ratios)

    def compare(one_by_one, fused, device):
        torch.testing.assert_close(fused(), one_by_one(), rtol=1e-3, atol=1e-4)
        return 1.0, left[0], left.pop(0)

    monkeypatch.setattr(measure, "compare", compare)
    return left


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["shufflenet", "xception", "functional"])
def test_a_chain_that_is_slower_is_left(name, training, device, monkeypatch):
    model, x = build(name, device).train(training), image(device)
    if training and not _loader.batch_norm_kernels_loaded(device.type):
        pytest.skip("a chain that runs module by module is not measured")
    timed(monkeypatch, 1.5, 0.5)
    fused = fuse(model, example_input=x)
    slower, taken = explain_fusion(fused)
    assert (slower.taken, taken.taken) == (False, True)
    mode = "in training" if training else "in evaluation"
    assert slower.reason.startswith("slower as one operation: 1.5e+03 ms, module by module 1e+03 ms, " + mode)
    assert "float32" in slower.reason
    assert calls(copy.deepcopy(fused), x).fused == 1
    assert_as_precise(model, fused, x)

    for other in (fuse(fused), copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert [f.reason for f in explain_fusion(other)] == [slower.reason, taken.reason]
    assert len(explain_fusion(unfuse(fused)).taken) == 2
    assert len(explain_fusion(model).taken) == 2
    timed(monkeypatch, 0.9)
    assert len(explain_fusion(fuse(fused, example_input=x)).taken) == 2  # measured again


def test_explaining_with_times(device, monkeypatch):
    model, x = build("shufflenet", device).eval(), image(device)
    timed(monkeypatch, 1.25, 0.5)
    explanation = explain_fusion(model, example_input=x)
    assert [(f.taken, f.gain) for f in explanation] == [(False, 0.8), (True, 2)]
    assert "(2.00 x as fast)" in str(explanation)
    assert len(explain_fusion(model).taken) == 2
    timed(monkeypatch, 1.0, 1.02)  # as fast, or nearly: taken, it needs less memory
    assert len(explain_fusion(model, example_input=x).taken) == 2


def test_a_gain_well_below_one_is_never_taken():
    """Whatever the median says: it can be of a machine that was busy."""
    for one_by_one, fused, ratio, slower in ((1.0, 2.0, 0.9, True), (1.0, 1.06, 1.0, True), (1.0, 1.04, 1.0, False)):
        assert measure.Verdict(one_by_one, fused, ratio, "").slower is slower


def test_equal_chains_are_measured_once(device, monkeypatch):
    model = nn.Sequential(*(nn.Sequential(depthwise(), nn.ReLU(), nn.Conv2d(8, 8, 1)) for _ in range(3)))
    model.append(nn.Sequential(depthwise(stride=2), nn.ReLU(), nn.Conv2d(8, 8, 1)))
    left = timed(monkeypatch, 2.0, 0.5)
    explanation = explain_fusion(model.to(device).eval(), example_input=image(device))
    assert [f.taken for f in explanation] == [False, False, False, True]
    assert not left


def test_measuring_changes_nothing(device, monkeypatch):
    model, inputs = build("switched", device).train(), (image(device), torch.ones(1, device=device))
    monkeypatch.setattr(measure, "_ROUNDS", 1)
    before = copy.deepcopy(model.state_dict())
    classes, random = [type(m) for m in model.modules()], torch.get_rng_state()
    explain_fusion(model, example_input=inputs)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [type(m) for m in model.modules()] == classes
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_meta_models_and_parts_that_do_not_run_are_not_measured(monkeypatch):
    timed(monkeypatch)
    model = build("mobilenet_v1").to("meta").eval()
    assert explain_fusion(model, example_input=image("meta"))[0].taken


@pytest.mark.parametrize("training", [False, True])
def test_measured(training, device):
    """Nothing is known of which chains are slower here; but what fuse() does is what its explanation says."""
    model, x = build("shufflenet", device).train(training), image(device)
    fused = fuse(model, example_input=x)
    taken = explain_fusion(fused).taken
    assert len(taken) + sum(f.reason.startswith("slower as one operation") for f in explain_fusion(fused)) == 2
    assert calls(copy.deepcopy(fused).eval(), x).fused == len(taken)
    assert_as_precise(model, fused, x)


# ---- other people's models -------------------------------------------------------------------------------------------

# (of which library, name, depthwise convolutions, chains)
NETWORKS = [
    ("torchvision", "mobilenet_v2", 17, 17),
    ("torchvision", "mobilenet_v3_large", 15, 15),
    ("torchvision", "mnasnet1_0", 17, 17),
    ("torchvision", "efficientnet_b0", 16, 16),
    ("torchvision", "shufflenet_v2_x1_0", 19, 19),
    ("torchvision", "convnext_tiny", 18, 0),
    ("timm", "mobilenetv1_100", 13, 13),
    pytest.param("timm", "legacy_xception", 34, 34, marks=pytest.mark.extended),
    ("timm", "efficientnet_lite0", 16, 16),
    ("timm", "mixnet_s", 43, 1),
]


@pytest.mark.parametrize(("library", "name", "convolutions", "chains"), NETWORKS)
def test_networks(library, name, convolutions, chains, isa):
    if "emulated" in isa:
        pytest.skip("whole networks take minutes there")
    try:
        networks = importlib.import_module("timm" if library == "timm" else "torchvision.models")
    except ImportError:
        pytest.skip(f"{library} is not installed")
    except RuntimeError as error:  # a torchvision for CUDA beside a torch without
        pytest.skip(f"{library} does not go with this torch: {error}")
    create = networks.create_model if library == "timm" else networks.get_model
    model = create(name, num_classes=10)
    explanation = explain_fusion(model)
    assert (len(explanation), len(explanation.taken)) == (convolutions, chains)
    model.eval()
    fused = fuse(model)
    x = torch.randn(2, 3, 64, 64)
    assert calls(fused, x).fused == chains
    if chains:
        assert_as_precise(model, fused, x)
        state = copy.deepcopy(model.state_dict())
        assert calls(fused.train(), x).fused == chains
        model.load_state_dict(state)
        for module in model.modules():
            if isinstance(module, nn.Dropout):  # is drawn anew each time
                module.p = 0.0
        assert_as_precise(model.train(), fuse(model), x)
