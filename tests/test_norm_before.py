"""The BatchNorm and the activation before a depthwise convolution, which fuse() makes part of the chain: its kernels
take their input through both as they read it."""

import copy
import pickle

import pytest
import torch
from fusion_models import MODELS, assert_as_precise, build, calls, depthwise, image, pointwise, randomized
from shapes import ALL, WINDOWS, identify, thinned, with_dtype
from torch import nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

from dsconv_cuda import _loader, compiled_folding, compiled_weights, explain_fusion, fuse, unfuse
from dsconv_cuda.activations import ACTIVATIONS
from dsconv_cuda.deferred import Deferred
from dsconv_cuda.fusion.chain import chain_of

pytestmark = pytest.mark.usefixtures("isa")

ONE_ISA = pytest.mark.one_isa


def needs_kernels(device):
    if not _loader.batch_norm_kernels_loaded(device.type):
        pytest.skip("no kernels for norms on this device")


def block(channels=8, width=12, *, out=8, activation=nn.ReLU6, out_activation=None) -> nn.Sequential:
    """1x1 -> norm -> activation -> depthwise -> norm -> activation -> 1x1 -> norm."""
    expand = nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width), activation()
    middle = depthwise(width), nn.BatchNorm2d(width), activation()
    return randomized(
        nn.Sequential(*expand, *middle, *pointwise(width, out), *((out_activation and [out_activation]) or []))
    )


def check_gradients(fused: nn.Module, stock: nn.Module, y: torch.Tensor, expected: torch.Tensor) -> None:
    """Of all parameters, for some gradient of the results."""
    dy = torch.randn_like(y)
    y.backward(dy), expected.backward(dy)
    for ours, theirs in zip(fused.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-6)


def defers(model: nn.Module, x: torch.Tensor) -> bool:
    """Whether the chain of `model` takes the input of the norm before it."""
    (chain,) = {chain_of(m) for m in model.modules()} - {None}
    return chain.takes_norm(chain.before.norm.weight.new_empty(2, chain.depthwise.in_channels, *x.shape[2:]))


# ---- the op ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "dtype", "channels_last"), with_dtype(thinned(ALL, 3) + WINDOWS[:2]), ids=identify)
def test_forward_after_a_norm(case, dtype, channels_last, isa, device):
    """At most twice as far from float64 as the norm by itself and then the forward; kept weights give the same bits."""
    if device.type != "cpu" or not _loader.has_kernel("fwd_after_norm_kept", "CPU"):
        pytest.skip("an op of the CPU kernels")
    ops = torch.ops.dsconv_cuda
    x, dw, pw, dw_bias, pw_bias = case.tensors(dtype, device, channels_last)
    vectors = torch.randn(4, case.c, dtype=torch.float64).abs_() + 0.1
    act = ACTIVATIONS["silu"].number
    padding = case.padding
    if padding == "same":
        spans = [d * (k - 1) for k, d in zip(case.kernel, case.dilation, strict=True)]
        padding = (spans[0] // 2, spans[1] // 2, spans[0] - spans[0] // 2, spans[1] - spans[1] // 2)
    else:
        padding = (*padding, *padding)
    geometry = (case.stride, padding, case.dilation)
    acts = (ACTIVATIONS[case.activation].number, ACTIVATIONS[case.out_activation].number)
    kept, other = (ops.keep(dw, pw, *geometry, *acts) for _ in range(2))
    first = ops.fwd_after_norm_kept(x, dw, pw, dw_bias, pw_bias, kept, 0, vectors, act)
    assert torch.equal(ops.fwd_after_norm_kept(x, dw, pw, dw_bias, pw_bias, kept, 0, vectors, act), first)
    rounded = ops.fwd_kept(ops.norm_act(x, vectors, act), dw, pw, dw_bias, pw_bias, other, 0)
    mean, invstd, gamma, beta = (v.view(1, -1, 1, 1) for v in vectors)
    u = nn.functional.silu(gamma * (x.double() - mean) * invstd + beta)
    exact = ops.fwd(u, *(None if t is None else t.double() for t in (dw, pw, dw_bias, pw_bias)), *geometry, *acts)
    assert first.stride() == rounded.stride()
    off, allowed = (torch.linalg.vector_norm(t.double() - exact) for t in (first, rounded))
    assert off <= 2 * allowed + torch.finfo(dtype).eps * torch.linalg.vector_norm(exact)


# ---- fused models ----------------------------------------------------------------------------------------------------


@ONE_ISA
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("activation", [nn.ReLU6, nn.SiLU, nn.Identity])
@pytest.mark.parametrize("training", [False, True])
def test_a_block_is_as_precise(training, activation, layout, device):
    needs_kernels(device)
    model = block(activation=activation, out_activation=nn.Hardswish()).to(device).train(training)
    fused, x = fuse(model), image(device).contiguous(memory_format=layout)
    assert_as_precise(model, fused, x)
    with torch.set_grad_enabled(training):
        assert defers(fused, x)
    assert calls(copy.deepcopy(fused), x).normalized == 0


@ONE_ISA
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_evaluation_without_gradients(name, device):
    """Called again and after changes, counted by PyTorch or not, to what is folded and to the norm before."""
    needs_kernels(device)
    model = build(name, device).eval()
    fused, x = fuse(model), image(device, name=name)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for change in (
        lambda norm: None,
        lambda norm: norm.weight.mul_(1.5),
        lambda norm: norm.running_mean.add_(0.5),
        lambda norm: norm.bias.data.sub_(0.25),
        lambda norm: norm.running_var.data.mul_(2),
    ):
        for norm in norms:
            change(norm)
        exact = copy.deepcopy(model).double()(x.double())
        stock, first, second = model(x), fused(x), fused(x)
        assert torch.equal(first, second)
        off, allowed = (torch.linalg.vector_norm(t - exact) for t in (first, stock))
        assert off <= 2 * allowed + 1e-7 * torch.linalg.vector_norm(exact)
    with torch.inference_mode():
        assert torch.equal(fused(x), second)


@ONE_ISA
def test_what_is_kept_for_backward(device):
    """One tensor for each of the three convolutions: the input, the value before the norm, and that before the last."""
    needs_kernels(device)
    kept = {}

    def pack(t):
        if t.dim() == 4 and not isinstance(t, nn.Parameter):
            kept[t.untyped_storage().data_ptr()] = t
        return t

    fused, x = fuse(block(channels=8, width=12, out=10).to(device)), image(device)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = fused(x)
    assert y.requires_grad
    assert sorted(t.shape[1] for t in kept.values()) == [8, 10, 12]


@ONE_ISA
@pytest.mark.parametrize("training", [False, True])
def test_norms_that_change_their_mode(training, device):
    """Frozen ones among others, and the other way round: then the norm runs by itself."""
    needs_kernels(device)
    for frozen in (("1",), ("4",), ("7",), ("1", "7"), ("4", "7")):
        model = block().to(device).train(training)
        for name in frozen:
            model.get_submodule(name).train(not training)
        fused = fuse(model)
        assert_as_precise(model, fused, image(device))
        if training:
            assert defers(fused, image(device)) == (frozen in (("4",), ("7",)))


@ONE_ISA
@pytest.mark.parametrize("at", ["1", "2", "3", "4"])
@pytest.mark.parametrize("training", [False, True])
def test_hooks_and_exchanges_that_come_later(training, at, device):
    needs_kernels(device)
    model = block().to(device).train(training)
    x = image(device)
    for change in (
        lambda m, seen: m.get_submodule(at).register_forward_hook(lambda _, i, o: seen.append(o.detach().clone())),
        lambda m, seen: setattr(m, at, nn.Identity() if at != "3" else depthwise(12)),
    ):
        torch.manual_seed(1)
        fused, seen, expected_seen = fuse(copy.deepcopy(model)), [], []
        change(fused, seen)
        torch.manual_seed(1)
        change(model_ := copy.deepcopy(model), expected_seen)
        if at == "3" and not seen:
            model_.load_state_dict(fused.state_dict())
        with torch.set_grad_enabled(training):
            torch.testing.assert_close(fused(x), model_(x), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(seen, expected_seen, rtol=1e-4, atol=1e-4)


@ONE_ISA
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("at", [3, 6])
def test_weights_that_are_computed_later(at, training, device):
    """A parametrized or pruned convolution of the chain: its modules run one by one, the norm before with them."""
    model, x = block().to(device, torch.float64).train(training), image(device, torch.float64)
    for change in (
        lambda conv: prune.l1_unstructured(conv, "weight", 0.3),
        lambda conv: nn.utils.parametrize.register_parametrization(conv, "weight", nn.Identity()),
        nn.utils.parametrizations.weight_norm,
    ):
        stock = copy.deepcopy(model)
        fused = fuse(copy.deepcopy(model))
        change(stock[at]), change(fused[at])
        with torch.set_grad_enabled(training):
            torch.testing.assert_close(fused(x), stock(x))
        assert not fused[at]._fused_chain.extent()
        assert "one by one" in explain_fusion(fused)[0].reason


@ONE_ISA
def test_autocast_and_lower_precision(device):
    needs_kernels(device)
    for training in (False, True):
        model = block(activation=nn.SiLU).to(device).train(training)
        fused, x = fuse(copy.deepcopy(model)), image(device)
        exact = copy.deepcopy(model).double()(x.double())
        with torch.autocast(device.type, torch.bfloat16), torch.set_grad_enabled(training):
            expected, y = model(x), fused(x)
        assert y.dtype == expected.dtype
        off, allowed = (torch.linalg.vector_norm(t.double() - exact) for t in (y, expected))
        assert off <= 2 * allowed
        for ours, theirs in zip(fused.buffers(), model.buffers(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)
    for dtype in (torch.bfloat16, torch.float16):
        model = block(activation=nn.SiLU).to(device, dtype)
        assert_as_precise(model, fuse(model), image(device, dtype))
        with torch.no_grad():
            exact = copy.deepcopy(model).eval().double()(image(device).double())
            torch.testing.assert_close(fuse(model.eval())(image(device, dtype)).shape, exact.shape)


@ONE_ISA
def test_errors_are_those_of_batch_norm(device):
    needs_kernels(device)
    model = block(out=8).to(device)
    fused = fuse(model)
    with pytest.raises(ValueError, match=r"Expected more than 1 value per channel when training.*\[1, 12, 1, 1\]"):
        fused(torch.randn(1, 8, 1, 1, device=device))
    y = fused(image(device).requires_grad_())
    grad = torch.autograd.grad(y.square().sum(), fused[0].weight, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        torch.autograd.grad(grad.square().sum(), fused[0].weight)
    x = image(device)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        assert torch.autograd.forward_ad.unpack_dual(fused(dual)).tangent is not None  # module by module


class Checkpointed(nn.Module):
    """Each half, or one of them, in a checkpoint of its own."""

    def __init__(self, whole, cut, halves, reentrant):
        super().__init__()
        self.whole, self.cut, self.halves, self.reentrant = whole, cut, halves, reentrant

    def forward(self, x):
        for part, checked in zip((self.whole[: self.cut], self.whole[self.cut :]), self.halves, strict=True):
            x = checkpoint(part, x, use_reentrant=self.reentrant) if checked else part(x)
        return x


@ONE_ISA
@pytest.mark.parametrize("halves", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("cut", [2, 3, 4, 6])
def test_checkpointing_across_the_chain(cut, reentrant, halves, device):
    needs_kernels(device)
    model, x = block().to(device, torch.float64), image(device, torch.float64)
    runs = []
    for module in (copy.deepcopy(model), fuse(copy.deepcopy(model))):
        mine = x.clone().requires_grad_()
        y = Checkpointed(module, cut, halves, reentrant)(mine)
        y.square().sum().backward()
        runs.append([y.detach(), mine.grad, *(p.grad for p in module.parameters()), *module[:3].buffers()])
    for actual, expected in zip(*reversed(runs), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


class FrozenStem(nn.Module):
    """Gradients are off up to the norm, by the code of forward, which a tracer runs; or by an attribute later."""

    def __init__(self, off: bool):
        super().__init__()
        layers = block(activation=nn.ReLU)
        self.stem, self.rest, self.off = layers[:3], layers[3:], off

    def forward(self, x):
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.off):
            x = self.stem(x)
        return self.rest(x)


@ONE_ISA
def test_gradients_that_are_switched_within(device):
    """What the norm has deferred is the value to whoever does not take it so, without a gradient where it had none."""
    needs_kernels(device)
    for off in (True, False):
        for training in (False, True):
            model = FrozenStem(off=off).to(device).train(training)
            fused = fuse(copy.deepcopy(model))
            assert explain_fusion(model)[0].reason.startswith("depthwise" if off else "BatchNorm -> relu -> depthwise")
            model.off = fused.off = True
            x = image(device).requires_grad_()
            y, expected = fused(x), model(x)
            torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
            dy = torch.randn_like(y)
            for m, out in ((fused, y), (model, expected)):
                out.backward(dy)
                assert x.grad is None
                assert m.stem[1].weight.grad is None
            for ours, theirs in zip(fused.rest.parameters(), model.rest.parameters(), strict=True):
                torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-3)


@ONE_ISA
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("out", [10, 12])
def test_parts_that_are_called_by_themselves(out, training, device):
    """A slice of the model ends or begins within the chain: values and statistics are those of the modules."""
    needs_kernels(device)
    model = block(out=out).to(device, torch.float64).train(training)
    x = image(device, torch.float64)
    for cut in (2, 3, 4):
        fused, stock = fuse(copy.deepcopy(model)), copy.deepcopy(model)
        with torch.set_grad_enabled(training):
            middle, expected = fused[:cut](x), stock[:cut](x)
            assert cut > 3 or type(middle) is Deferred
            if cut < 4:  # what the depthwise convolution gives is the chain's result, as ever
                torch.testing.assert_close(middle + 0, expected)
                torch.testing.assert_close(torch.stack([middle.detach()])[0], expected.detach())
                torch.testing.assert_close(fused[cut:](expected), stock[cut:](expected))
                torch.testing.assert_close(fused[cut:](middle), stock[cut:](expected))
            torch.testing.assert_close(fused(x), stock(x))
        torch.testing.assert_close(list(fused.buffers())[:3], list(stock.buffers())[:3])


@ONE_ISA
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("cut", [2, 3])
def test_a_part_that_is_compiled_by_itself(cut, training, device):
    """What goes from the one half to the other, compiled or not, has its gradients."""
    needs_kernels(device)
    model = block().to(device, torch.float64).train(training)
    x = image(device, torch.float64)
    for compiled in ("head", "tail"):
        torch._dynamo.reset()
        fused, stock = fuse(copy.deepcopy(model)), copy.deepcopy(model)
        head, tail = fused[:cut], fused[cut:]
        if compiled == "head":
            head = torch.compile(head, backend="aot_eager")
        else:
            tail = torch.compile(tail, backend="aot_eager")
        with torch.set_grad_enabled(training):
            y, expected = tail(head(x)), stock(x)
            torch.testing.assert_close(y, expected)
            if training:
                check_gradients(fused, stock, y, expected)
    torch._dynamo.reset()


IN_PLACE = {
    "multiplied": lambda t: t.mul_(0.5),
    "channels": lambda t: t.__setitem__((slice(None), slice(None, None, 2)), 0),
    "clamped": lambda t: t.clamp_(max=0.1),
    "view": lambda t: t.view(-1)[::3].zero_(),
    "data": lambda t: t.data.zero_(),
}


@ONE_ISA
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("edit", IN_PLACE)
def test_what_is_written_to_the_value_stays(edit, training, device):
    """By a hook on what holds the norm, by whoever calls the model in parts, and by a pre-hook on the convolution."""
    needs_kernels(device)
    layers = block(out=12)
    model = nn.Sequential(nn.Sequential(layers[:3]), *layers[3:]).to(device, torch.float64).train(training)
    x, write = image(device, torch.float64), IN_PLACE[edit]

    def hook(module, inputs, output=None):
        write(inputs[0] if output is None else output)

    def by_hook(m):
        m[0].register_forward_hook(hook)
        return m(x)

    def by_inner_hook(m):
        m[1].register_forward_pre_hook(hook)
        return m(x)

    def in_parts(m):
        middle = m[0](x)
        write(middle)
        return m[1:](middle)

    for call in (by_hook, by_inner_hook, in_parts):
        fused, stock = fuse(copy.deepcopy(model)), copy.deepcopy(model)
        assert type(fused[0](x.clone().requires_grad_(training))) is Deferred or not training
        with torch.set_grad_enabled(training):
            y, expected = call(fused), call(stock)
        torch.testing.assert_close(y, expected)
        if training:
            check_gradients(fused, stock, y, expected)


@ONE_ISA
def test_gradients_at_the_value(device):
    """As Grad-CAM takes them: by a hook on the tensor, by retain_grad(), in a hook on a module or between two parts."""
    needs_kernels(device)
    layers = block(out=12)
    model = nn.Sequential(nn.Sequential(layers[:3]), *layers[3:]).to(device, torch.float64)
    x = image(device, torch.float64)

    def watch(found, value):
        value.retain_grad()
        value.register_hook(lambda grad: found.append(grad.clone()))
        found.append(value)

    def by_hook(m, found):
        m[0].register_forward_hook(lambda module, inputs, output: watch(found, output))
        return m(x)

    def in_parts(m, found):
        middle = m[0](x)
        watch(found, middle)
        return m[1:](middle)

    for call in (by_hook, in_parts):
        runs = []
        for m in (fuse(copy.deepcopy(model)), copy.deepcopy(model)):
            found = []
            call(m, found).square().sum().backward()
            value, grad = found
            runs.append((value.detach() + 0, value.grad, grad))
        torch.testing.assert_close(*runs)


@ONE_ISA
@torch.no_grad()
def test_what_changes_before_the_value_is_made(device):
    """It never becomes another one: what is asked for later than that raises, what was asked for before stays."""
    needs_kernels(device)
    model = block().to(device).eval()
    for change in (
        lambda m, y: m[1].weight.mul_(2),
        lambda m, y: m[1].running_mean.add_(1),
        lambda m, y: m[1].load_state_dict(copy.deepcopy(model[1]).state_dict()),
        lambda m, y: setattr(m[1], "eps", 0.5),
        lambda m, y: y.mul_(2),
    ):
        fused = fuse(copy.deepcopy(model))
        y = fused[0](image(device))
        early, late, used = (fused[1:3](y) for _ in range(3))
        before = early + 0
        change(fused, y)
        assert torch.equal(early + 0, before)
        with pytest.raises(RuntimeError, match=r"had not been computed yet .* written to in place"):
            late + 0
        with pytest.raises(RuntimeError, match="had not been computed yet"):
            fused[3:](used)


class WritesToTheInput(nn.Module):
    """The input of the norm is written to while what comes of the norm is on its way to the convolution."""

    def __init__(self, write):
        super().__init__()
        layers = block(out=12)
        self.expand, self.head, self.tail, self.write = layers[0], layers[1:3], layers[3:], write

    def forward(self, x):
        y = self.expand(x)
        u = self.head(y)
        self.write(y)
        return self.tail(u)


@ONE_ISA
@torch.no_grad()
@pytest.mark.parametrize("write", [lambda y: y.relu_(), lambda y: nn.functional.relu(y, inplace=True)])
def test_a_norm_whose_input_is_written_to_runs_by_itself(write, device):
    model = WritesToTheInput(write).to(device).eval()
    assert explain_fusion(model)[0].reason.startswith("depthwise")
    x = image(device)
    torch.testing.assert_close(fuse(model)(x), model(x), rtol=1e-4, atol=1e-5)


class Recorder:
    def __init__(self):
        self.seen = []

    def __call__(self, module, inputs, output):
        self.seen.append(output.detach().clone())

    def scaled(self, module, inputs, output):
        return output * 2


@ONE_ISA
@pytest.mark.parametrize("training", [False, True])
def test_hooks_on_what_contains_the_norm(training, device):
    needs_kernels(device)
    for when in ("before", "after"):
        for kind in ("__call__", "scaled"):
            layers = block(out=12)
            model = nn.Sequential(nn.Sequential(layers[:3]), *layers[3:]).to(device, torch.float64).train(training)
            recorders = Recorder(), Recorder()
            if when == "before":
                fused = fuse(copy.deepcopy(model))
            model[0].register_forward_hook(getattr(recorders[0], kind))
            if when == "after":  # the hook is there when the model is fused
                fused = fuse(copy.deepcopy(model))
                fused[0]._forward_hooks.clear()
            fused[0].register_forward_hook(getattr(recorders[1], kind))
            with torch.set_grad_enabled(training):
                x = image(device, torch.float64)
                torch.testing.assert_close(fused(x), model(x))
            torch.testing.assert_close(recorders[1].seen, recorders[0].seen)


class EvaluationSkips(nn.Module):
    """The norm is used in both modes, the depthwise convolution in one."""

    def __init__(self, skip_in_training: bool):
        super().__init__()
        layers = block(out=12)
        self.head, self.tail, self.skips = layers[:3], layers[3:], skip_in_training

    def forward(self, x):
        u = self.head(x)
        return u if self.training == self.skips else self.tail(u)


@ONE_ISA
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("skips", [False, True])
def test_a_norm_that_others_use_too(skips, compiled, device):
    needs_kernels(device)
    torch._dynamo.reset()
    model, x = EvaluationSkips(skips).to(device, torch.float64), image(device, torch.float64)
    fused = fuse(copy.deepcopy(model))
    call = torch.compile(fused, backend="eager") if compiled else fused
    for training in (True, False):
        model.train(training), fused.train(training)
        with torch.set_grad_enabled(training):
            torch.testing.assert_close(call(x) + 0, model(x))
    torch._dynamo.reset()


@ONE_ISA
def test_autocast_of_what_is_not_in_its_type(device):
    """A norm of float32 values under autocast is one of float32: its result is rounded, not its input."""
    needs_kernels(device)
    layers = block(activation=nn.SiLU)
    model = layers[1:].to(device)
    fused = fuse(copy.deepcopy(model))
    x = 1000 + torch.randn(4, 12, 9, 11, device=device)
    exact = copy.deepcopy(model).double()(x.double())
    with torch.autocast(device.type, torch.bfloat16):
        expected, y = model(x), fused(x)
    off, allowed = (torch.linalg.vector_norm(t.double() - exact) for t in (y, expected))
    assert off <= 2 * allowed


LEFT_OUT = {
    "used twice": lambda m: nn.Sequential(*m[:2], SumOf(m[2], m[3:])),
    "hook": lambda m: m[1].register_forward_hook(lambda *_: None) and m,
    "another activation": lambda m: nn.Sequential(*m[:2], nn.PReLU(), *m[3:]),
    "two activations": lambda m: nn.Sequential(*m[:2], nn.ReLU(), nn.ReLU(), *m[3:]),
    "no statistics": lambda m: nn.Sequential(m[0], nn.BatchNorm2d(12, track_running_stats=False), *m[2:]),
    "group norm": lambda m: nn.Sequential(m[0], nn.GroupNorm(3, 12), *m[2:]),
    "pool between": lambda m: nn.Sequential(*m[:3], nn.AvgPool2d(1), *m[3:]),
    "end of another chain": lambda m: nn.Sequential(depthwise(), nn.Conv2d(8, 12, 1), *m[1:]),
}


class SumOf(nn.Module):
    def __init__(self, first, rest):
        super().__init__()
        self.first, self.rest = first, rest

    def forward(self, x):
        x = self.first(x)
        return self.rest(x) + x.mean()


@ONE_ISA
@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_is_left_to_run_by_itself(name, device):
    model = LEFT_OUT[name](block()).to(device).eval()
    finding = explain_fusion(model)[-1]
    assert finding.taken
    assert finding.reason.startswith("depthwise")
    x = image(device)
    with torch.no_grad():
        torch.testing.assert_close(fuse(model)(x), model(x), rtol=1e-4, atol=1e-4)


@ONE_ISA
def test_copies_and_classes(device):
    needs_kernels(device)
    model = block().to(device)
    classes = [type(m) for m in model.modules()]
    fused, x = fuse(model), image(device)
    assert type(fused[1]).__name__ == "DeferredBatchNorm2d"
    assert type(fused[2]).__name__ == "DeferredReLU6"
    assert explain_fusion(fused)[0].members == tuple("12345678"[:7])
    assert isinstance(fused[1], nn.BatchNorm2d)
    for copied in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert defers(copied, x)
        torch.testing.assert_close(copied(x), copy.deepcopy(model)(x), rtol=1e-4, atol=1e-4)
    assert [type(m) for m in unfuse(fused).modules()] == classes
    traced = torch.fx.symbolic_trace(fused)
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == list("01234567")


@ONE_ISA
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(("training", "kept"), [(False, False), (False, True), (True, False)])
def test_one_graph_holds_the_norm_before(training, kept, dims, backend, device, monkeypatch):
    """Nothing of BatchNorm and its activation is left beside the two ops of a chain in training, and one without."""
    needs_kernels(device)
    torch._dynamo.reset()
    monkeypatch.setattr(compiled_folding, "LEAST_ELEMENTS", 1 if kept else 1 << 30)
    conv, norm = (getattr(nn, f"{kind}{dims}d") for kind in ("Conv", "BatchNorm"))
    middle = conv(12, 12, 3, padding=1, groups=12), norm(12), nn.SiLU()
    layers = (conv(8, 12, 1, bias=False), norm(12), nn.SiLU(), *middle, conv(12, 8, 1), norm(8))
    model = randomized(nn.Sequential(*layers)).to(device, torch.float64).train(training)
    x, targets = torch.randn(2, 8, *(9, 11, 5)[:dims], device=device, dtype=torch.float64), []

    def noting(graph, inputs):
        targets.extend(str(n.target) for n in graph.graph.nodes if n.op == "call_function")
        return graph if backend == "eager" else torch._dynamo.lookup_backend(backend)(graph, inputs)

    fused = fuse(copy.deepcopy(model))
    compiled = torch.compile(fused, fullgraph=True, backend=noting)
    with torch.set_grad_enabled(training):
        expected, y = model(x), compiled(x)
        torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(list(fused.buffers()), list(model.buffers()))
        if training:
            dy, wanted = torch.randn_like(y), [m for m in range(8) if model[m]._parameters]
            grads = [
                torch.autograd.grad(out, [m[i].weight for i in wanted], dy)
                for out, m in ((y, fused), (expected, model))
            ]
            torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(fused.eval()(x), model.eval()(x), rtol=1e-6, atol=1e-6)
    assert not any("batch_norm" in t or "silu" in t for t in targets)
    assert sum("norm_later" in t for t in targets) == training
    if compiled_weights.registered and not training:
        assert [t for t in targets if "fwd" in t] == [
            "dsconv_cuda.fwd_folded" if kept else "dsconv_cuda.fwd_after_norm_in_graph"
        ]
    compiled(torch.cat((x, x)))
    torch._dynamo.reset()


@ONE_ISA
@torch.no_grad()
def test_exports_hold_stock_operations(device):
    model, x = block().to(device).eval(), image(device)
    program = torch.export.export(fuse(model), (x,))
    names = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert not any("after_norm" in name or "norm_act" in name or "folded" in name for name in names)
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-4)


@ONE_ISA
def test_measured_with_its_norm(device):
    """example_input times the chain with the norm before, and the norm with the modules."""
    needs_kernels(device)
    for training in (False, True):
        model = block().to(device).train(training)
        (finding,) = explain_fusion(model, example_input=image(device))
        assert finding.gain is not None
        with torch.set_grad_enabled(training):
            assert finding.chain.takes_norm(torch.empty(2, 12, 19, 21, device=device))
