"""What lets a call in evaluation take the short way of an earlier one (dsconv_cuda/guards.py), and what stops it."""

import copy
import gc
import threading
import weakref

import pytest
import torch
from fusion_models import depthwise, image, pointwise, randomized
from torch import nn
from torch.nn.utils import parametrize, prune

from dsconv_cuda import (
    DepthwiseSeparableConvBN1d,
    DepthwiseSeparableConvBN2d,
    DepthwiseSeparableConvBN3d,
    fuse,
)
from dsconv_cuda.folded import Folded
from dsconv_cuda.fusion.chain import chain_of
from dsconv_cuda.guards import Guards

pytestmark = [pytest.mark.usefixtures("isa"), pytest.mark.one_isa]


class Doubling(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def _guards(*modules: nn.Module) -> Guards:
    guards = Guards()
    for module in modules:
        guards.plain(module)
        (guards.norm if isinstance(module, nn.BatchNorm2d) else guards.convolution)(module)
    return guards


BREAKS = {
    "hook": lambda conv, norm: conv.register_forward_hook(lambda *_: None),
    "pre-hook": lambda conv, norm: norm.register_forward_pre_hook(lambda *_: None),
    "backward hook": lambda conv, norm: norm.register_full_backward_hook(lambda *_: None),
    "backward pre-hook": lambda conv, norm: conv.register_full_backward_pre_hook(lambda *_: None),
    "forward": lambda conv, norm: setattr(conv, "forward", lambda x: x),
    "class": lambda conv, norm: setattr(conv, "__class__", Doubling),
    "weight": lambda conv, norm: setattr(conv, "weight", nn.Parameter(conv.weight.data)),
    "bias": lambda conv, norm: setattr(conv, "bias", nn.Parameter(torch.zeros(4))),
    "stride": lambda conv, norm: setattr(conv, "stride", (2, 2)),
    "padding mode": lambda conv, norm: setattr(conv, "padding_mode", "circular"),
    "training": lambda conv, norm: norm.train(),
    "statistics": lambda conv, norm: setattr(norm, "running_mean", None),
    "pruned": lambda conv, norm: prune.l1_unstructured(conv, "weight", 0.5),
    "parametrized": lambda conv, norm: parametrize.register_parametrization(conv, "weight", nn.Identity()),
}


@pytest.mark.parametrize("change", BREAKS)
def test_what_they_see(change):
    conv, norm = nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4).eval()
    guards = _guards(conv, norm)
    assert guards.hold()
    with torch.no_grad():
        conv.weight.mul_(2), norm.running_mean.add_(1)  # looked after elsewhere
    assert guards.hold()
    BREAKS[change](conv, norm)
    assert not guards.hold()


def test_a_hook_that_is_gone_again():
    conv = nn.Conv2d(4, 4, 1)
    guards = _guards(conv)
    hook = conv.register_forward_hook(lambda *_: None)
    assert not guards.hold()
    hook.remove()
    assert guards.hold()


# 1x1 -> [norm -> activation ->] depthwise -> norm -> activation -> 1x1 -> norm -> activation; chains with a norm before
# and without one.
def _model(before: bool) -> nn.Sequential:
    norm = [nn.BatchNorm2d(12), nn.ReLU6()] if before else [nn.Identity(), nn.ReLU6()]
    first = nn.Conv2d(8, 12, 1, bias=not before), *norm
    middle = depthwise(12), nn.BatchNorm2d(12), nn.LeakyReLU()
    return randomized(nn.Sequential(*first, *middle, *pointwise(12, 10), nn.ReLU())).eval()


def _hook(at):
    return lambda model: model[at].register_forward_hook(lambda module, inputs, y: y * 1.5)


CHANGES = {
    **{f"hook on {at}": _hook(at) for at in range(1, 9)},
    "hook on inputs": lambda model: model[3].register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,)),
    "forward": lambda model: setattr(model[4], "forward", lambda y: y * 2),
    "activation": lambda model: setattr(model[5], "negative_slope", 0.3),
    "another activation": lambda model: model.__setitem__(5, nn.Tanh()),
    "no norm": lambda model: model.__setitem__(7, nn.Identity()),
    "another convolution": lambda model: model.__setitem__(6, nn.Conv2d(12, 10, 1, bias=False)),
    "weight": lambda model: model[3].weight.mul_(2),
    "weight behind PyTorch": lambda model: model[6].weight.data.mul_(2),
    "another weight": lambda model: setattr(model[3], "weight", nn.Parameter(torch.ones_like(model[3].weight))),
    "stride": lambda model: setattr(model[3], "stride", (2, 1)),
    "padding mode": lambda model: [
        setattr(model[3], "padding_mode", "circular"),
        setattr(model[3], "_reversed_padding_repeated_twice", [1, 1, 1, 1]),
    ],
    "eps": lambda model: setattr(model[4], "eps", 0.5),
    "statistics": lambda model: model[7].running_var.mul_(3),
    "statistics behind PyTorch": lambda model: model[4].running_mean.data.add_(1),
    "training": lambda model: model[7].train(),
    "pruned": lambda model: prune.ln_structured(model[6], "weight", 0.5, 2, 0),
    "double": lambda model: model.double().float()[4].bias.add_(1),
}
OF_NORM = {
    "statistics of the norm before": lambda model: model[1].running_mean.add_(1),
    "the norm before behind PyTorch": lambda model: model[1].weight.data.mul_(2),
    "eps of the norm before": lambda model: setattr(model[1], "eps", 0.5),
    "training of the norm before": lambda model: model[1].train(),
    "another norm before": lambda model: model.__setitem__(1, nn.BatchNorm2d(12, eps=2.0).eval()),
}


def _folded(model: nn.Module, before: bool) -> Folded:
    (chain,) = {chain_of(module) for module in model.modules()} - {None}
    return chain._folded[2, before]


@torch.no_grad()
@pytest.mark.parametrize(
    ("before", "change"), [*((b, c) for b in (False, True) for c in CHANGES), *((True, c) for c in OF_NORM)]
)
def test_a_chain_that_changes(before, change, device):
    model, x = _model(before).to(device), image(device)
    fused = fuse(copy.deepcopy(model))
    for _ in range(3):
        was = fused(x)
    if device.type == "cpu":
        guards = _folded(fused, before).guards
        assert guards is not None
        assert guards.hold()
    for of in (model, fused):
        torch.manual_seed(1)
        (CHANGES | OF_NORM)[change](of)
    if change == "another convolution":
        model.load_state_dict(fused.state_dict())
    for _ in range(3):
        expected, y = model(x), fused(x)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
        assert was.shape != y.shape or not torch.allclose(was, y, rtol=1e-3)
    for (name, ours), theirs in zip(fused.state_dict().items(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)


@pytest.mark.parametrize("before", [False, True])
def test_other_inputs_and_modes(before, device):
    """Calls that are not those which the guards are of, after some that were."""
    model, x = _model(before).to(device), image(device)
    fused = fuse(copy.deepcopy(model))
    with torch.no_grad():
        for _ in range(3):
            fused(x)
        torch.testing.assert_close(fused(x[:1]), model(x[:1]), rtol=1e-4, atol=1e-5)
        last = x.contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(fused(last), model(last), rtol=1e-4, atol=1e-5)
        one = x[:1, :, :1, :1]
        torch.testing.assert_close(fused(one), model(one), rtol=1e-4, atol=1e-5)
        with torch.autocast(device.type, torch.bfloat16):
            assert fused(x).dtype == model(x).dtype
            torch.testing.assert_close(fused(x), model(x), rtol=5e-2, atol=1e-1)
        torch.testing.assert_close(torch.func.vmap(fused)(x[None])[0], model(x), rtol=1e-4, atol=1e-5)
        for wrong in (x[0], x[:, :5], x.double()):
            with pytest.raises((RuntimeError, ValueError, TypeError)):
                model(wrong)
            with pytest.raises((RuntimeError, ValueError, TypeError)):
                fused(wrong)
    for of in (fused, model):
        given = x.clone().requires_grad_()
        of(given).square().sum().backward()
        of.gradient = given.grad
    torch.testing.assert_close(fused.gradient, model.gradient, rtol=1e-3, atol=1e-3)
    for ours, theirs in zip(fused.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-2)
    with torch.inference_mode():
        torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_block_without_gradients_of_parameters(device):
    """Its input gets one by the short way, too."""
    block = DepthwiseSeparableConvBN2d(6, 8, 3, padding=1, device=device).eval().requires_grad_(False)
    gradients = []
    for times in (4, 1):
        of = copy.deepcopy(block)
        for _ in range(times):
            x = torch.ones(1, 6, 5, 5, device=device).requires_grad_()
            of(x).sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


# ---- what comes and goes: the state of another call is not taken for that of the guards ------------------------------


def _block(device) -> DepthwiseSeparableConvBN2d:
    return randomized(DepthwiseSeparableConvBN2d(6, 8, 3, padding=1)).to(device).eval()


def _for_a_while(of, name, value, x, block) -> None:
    """Calls with `value` in that place, which has the old one again afterwards."""
    old = getattr(of, name)
    setattr(of, name, value)
    for _ in range(3):
        block(x)
    setattr(of, name, old)


def _functional_call(block, x):
    other = {name: torch.rand_like(t) for name, t in block.named_parameters()}
    for _ in range(3):
        torch.func.functional_call(block, other, (x,))


def _written_to_later(block, x):
    weight = block.depthwise.weight
    block.depthwise.weight = nn.Parameter(torch.rand_like(weight))
    block(x)
    block.depthwise.weight = weight
    block(x)
    weight.mul_(2)


def _with_another_input(kind):
    def change(block, x):
        block.bn1.running_mean.add_(3)
        block(kind(x))

    return change


def _buffer_for_none(block, x):
    del block.depthwise.bias  # which was None
    block.depthwise.register_buffer("bias", torch.full((6,), 5.0, device=x.device))


def _other_dictionary(block, x):
    conv = block.pointwise
    conv._parameters = {k: v if v is None else nn.Parameter(3 * v) for k, v in conv._parameters.items()}


def _identity_that_acts(block, x):
    block.bn1 = nn.Identity()
    block.bn1.register_forward_hook(lambda module, inputs, y: 2 * y + 1)


COME_AND_GO = {
    "functional_call": _functional_call,
    "weight": lambda b, x: _for_a_while(b.depthwise, "weight", nn.Parameter(torch.rand_like(b.depthwise.weight)), x, b),
    "statistics": lambda b, x: _for_a_while(b.bn1, "running_mean", torch.ones(6, device=x.device), x, b),
    "stride": lambda b, x: _for_a_while(b.depthwise, "stride", (2, 2), x, b),
    "dilation": lambda b, x: _for_a_while(b.depthwise, "dilation", (2, 2), x, b),
    "written to later": _written_to_later,
    "a parameter as input": _with_another_input(nn.Parameter),
    "a subclass as input": _with_another_input(lambda x: x.as_subclass(type("Other", (torch.Tensor,), {}))),
    "a buffer for None": _buffer_for_none,
    "another dictionary": _other_dictionary,
}


@torch.no_grad()
@pytest.mark.parametrize("change", COME_AND_GO)
def test_others_for_a_while(change, device):
    block, x = _block(device), torch.randn(2, 6, 9, 9, device=device)
    for _ in range(4):
        block(x)
    COME_AND_GO[change](block, x)
    for _ in range(3):
        torch.testing.assert_close(block(x), block.one_by_one(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_an_identity_that_acts(device):
    block, x = _block(device), torch.randn(2, 6, 9, 9, device=device)
    block.bn1 = nn.Identity()
    for _ in range(4):
        block(x)
    _identity_that_acts(block, x)
    torch.testing.assert_close(block(x), block.one_by_one(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("at", [3, 6])
@pytest.mark.parametrize(
    "compute", [prune.l1_unstructured, nn.utils.weight_norm, nn.utils.parametrizations.weight_norm]
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
def test_weights_that_are_computed_from_now_on(compute, at, device):
    model, x = _model(True).to(device), image(device)
    fused = fuse(copy.deepcopy(model))
    for _ in range(4):
        fused(x)
    for of in (model, fused):
        compute(of[at], "weight", *([0.5] if compute is prune.l1_unstructured else []))
    torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("before", [False, True])
def test_equal_calls_give_equal_bits_from_the_first_on(before, device):
    model, x = _model(before).to(device), torch.randn(2, 8, 48, 48, device=device)
    fused = fuse(model)
    first, *others = (fused(x) for _ in range(4))
    assert all(torch.equal(first, y) for y in others)
    assert torch.equal(copy.deepcopy(fused)(x), first)


@torch.no_grad()
def test_what_was_replaced_is_freed(device):
    for model in (_block(device), fuse(_model(False).to(device)), fuse(_model(True).to(device))):
        channels = 6 if isinstance(model, DepthwiseSeparableConvBN2d) else 8
        x = torch.randn(2, channels, 9, 9, device=device)
        for _ in range(4):
            model(x)
        old = [weakref.ref(p) for p in model.parameters()]
        model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
        for _ in range(3):
            model(x)
        gc.collect()
        assert not any(r() is not None for r in old)


@torch.no_grad()
def test_a_fold_that_raises_raises_again(device):
    block, x = _block(device), torch.randn(2, 6, 9, 9, device=device)
    for _ in range(4):
        block(x)
    block.bn1.weight.data = torch.ones(5, device=device)
    for _ in range(2):
        with pytest.raises((RuntimeError, ValueError)):
            block(x)


@torch.no_grad()
def test_threads_that_call_after_a_write(device):
    """Whichever folds, all see what was written before they began."""
    block, x = _block(device), torch.randn(2, 6, 9, 9, device=device)
    stale = []

    def call(expected, barrier):
        with torch.no_grad():
            barrier.wait()
            y = block(x)
            if not torch.allclose(y, expected, rtol=1e-4, atol=1e-5):
                stale.append(y)

    for _ in range(100):
        block(x)
        block.bn1.running_mean.add_(1)
        expected, barrier = block.one_by_one(x), threading.Barrier(3)
        threads = [threading.Thread(target=call, args=(expected, barrier)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not stale


@torch.no_grad()
def test_blocks_in_1d_and_3d(device):
    for kind, size in ((DepthwiseSeparableConvBN1d, (7,)), (DepthwiseSeparableConvBN3d, (3, 5, 4))):
        block = kind(6, 8, 3, padding="causal" if len(size) == 1 else 1, device=device).eval()
        x = torch.randn(2, 6, *size, device=device)
        expected = block.one_by_one(x)
        for _ in range(4):
            torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)
        if device.type == "cpu":
            assert block._folded.guards is not None
        with pytest.raises((RuntimeError, ValueError)):
            block(x[0])
