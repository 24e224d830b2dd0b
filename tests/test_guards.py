"""What lets a call in evaluation take the short way of an earlier one (dsconv_cuda/guards.py), and what stops it."""

import copy

import pytest
import torch
from fusion_models import depthwise, image, pointwise, randomized
from torch import nn
from torch.nn.utils import parametrize, prune

from dsconv_cuda import DepthwiseSeparableConvBN1d, DepthwiseSeparableConvBN2d, DepthwiseSeparableConvBN3d, fuse
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
