"""What the modules ask of their input and of their children .depthwise and .pointwise, in every form of a call: another
number of channels is refused, a child with a forward of its own is called, a strided pointwise child is refused."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

import dsconv_cuda
from dsconv_cuda.activations import ACTIVATIONS

pytestmark = [pytest.mark.usefixtures("isa"), pytest.mark.one_isa]

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
KINDS = {
    name: (getattr(dsconv_cuda, f"DepthwiseSeparable{name}"), int(name[-2]))
    for name in ("Conv1d", "Conv2d", "Conv3d", "ConvBN1d", "ConvBN2d", "ConvBN3d")
}
BOTH_IN_2D = ("Conv2d", "ConvBN2d")


def _make(name, device, **kwargs) -> nn.Module:
    kind, _ = KINDS[name]
    module = kind(4, 6, 3, padding=1, activation="relu6", out_activation="silu", **kwargs).to(device)
    for norm in (m for m in module.children() if isinstance(m, nn.modules.batchnorm._BatchNorm)):
        nn.init.uniform_(norm.running_var, 0.5, 2)
        nn.init.normal_(norm.running_mean)
    return module


def _image(name, channels, device) -> torch.Tensor:
    return torch.randn(2, channels, *(6, 5, 3)[: KINDS[name][1]], device=device)


def _plain(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The children one after the other."""
    norm1, norm2 = (getattr(module, name, nn.Identity()) for name in ("bn1", "bn2"))
    a = ACTIVATIONS[module.activation].value(norm1(module.depthwise(x)))
    return ACTIVATIONS[module.out_activation].value(norm2(module.pointwise(a)))


# ---- channels of the input -------------------------------------------------------------------------------------------


def _autocast(call, x):
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        return call(x)


FORMS = {
    "plain": lambda module, x: module(x),
    "compiled": lambda module, x: torch.compile(module, backend="aot_eager", fullgraph=True)(x),
    "autocast": lambda module, x: _autocast(module, x),
    "in a sequence": lambda module, x: dsconv_cuda.DepthwiseSeparableSequence(module)(x),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", KINDS)
def test_other_channels_are_refused(name, form, device):
    """Those too of which the module's are a multiple, which the function would take for a channel multiplier."""
    right = _image(name, 4, device)
    torch.compiler.reset()
    for train in (False, True):
        for grad in (False, True):
            module = _make(name, device).train(train)
            with torch.set_grad_enabled(grad):
                for _ in range(3):  # the later ones with what is kept
                    for channels in (1, 2, 3, 8):
                        with pytest.raises(
                            (ValueError, torch._dynamo.exc.TorchRuntimeError, torch._dynamo.exc.Unsupported),
                            match=rf"DepthwiseSeparable{name}: input must have 4 channels, .* got {channels}: shape \[",
                        ):
                            FORMS[form](module, _image(name, channels, device))
                    FORMS[form](module, right)


@pytest.mark.parametrize("name", [name for name in KINDS if "BN" not in name])
def test_other_channels_of_unbatched_input_are_refused(name, device):
    module = _make(name, device)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"input must have 4 channels, as many as \.depthwise takes, got 2: shape"):
            module(_image(name, 2, device)[0])
        assert module(_image(name, 4, device)[0]).shape[0] == 6


def test_other_channels_between_joined_blocks_are_refused(device):
    block = partial(dsconv_cuda.DepthwiseSeparableConvBN2d, kernel_size=3)
    chain = dsconv_cuda.DepthwiseSeparableSequence(block(4, 2), block(8, 4)).to(device)
    with pytest.raises(ValueError, match=r"DepthwiseSeparableConvBN2d: input must have 8 channels, .* got 2: shape \["):
        chain(torch.randn(2, 4, 8, 8, device=device))


def test_a_channel_multiplier_counts_the_channels_of_the_input(device):
    module = dsconv_cuda.DepthwiseSeparableConv2d(2, 6, 3, channel_multiplier=2).to(device)
    assert module(torch.randn(2, 2, 5, 5, device=device)).shape == (2, 6, 3, 3)
    with pytest.raises(ValueError, match="input must have 2 channels"):
        module(torch.randn(2, 4, 5, 5, device=device))


def test_channels_of_a_pruned_module(device):
    """In place, as tools for structured pruning do it."""
    module = _make("ConvBN2d", device).eval()
    depthwise, pointwise = module.depthwise, module.pointwise
    with torch.no_grad():
        module(_image("ConvBN2d", 4, device))
        for conv, weight in ((depthwise, depthwise.weight[:3]), (pointwise, pointwise.weight[:, :3])):
            conv.weight = nn.Parameter(weight.clone())
        depthwise.in_channels = depthwise.out_channels = depthwise.groups = pointwise.in_channels = 3
        for name in ("weight", "bias", "running_mean", "running_var"):
            setattr(module.bn1, name, type(getattr(module.bn1, name))(getattr(module.bn1, name)[:3]))
        x = _image("ConvBN2d", 3, device)
        for _ in range(3):
            torch.testing.assert_close(module(x), _plain(module, x), rtol=1e-4, atol=1e-5)


# ---- children that do something else ---------------------------------------------------------------------------------


class Doubling(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class OtherWeights(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean(), bias)


class SameConv(nn.Conv2d):
    pass


def _own_forward(conv):
    conv.forward = lambda x, old=conv.forward: 3 * old(x)
    return conv


def _of_class(kind):
    def change(conv):
        new = kind(
            conv.in_channels, conv.out_channels, conv.kernel_size, 1, conv.padding, groups=conv.groups, bias=False
        )
        return new.to(conv.weight.device)

    return change


CHANGES = {
    "a subclass with its own forward": _of_class(Doubling),
    "a subclass that changes the weight": _of_class(OtherWeights),
    "a subclass with the same forward": _of_class(SameConv),
    "a forward of the instance": _own_forward,
    "a container": lambda conv: nn.Sequential(conv, nn.Tanh()),
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("child", ["depthwise", "pointwise"])
@pytest.mark.parametrize("name", BOTH_IN_2D)
def test_a_child_with_a_forward_of_its_own_is_called(name, child, change, compiled, device):
    """From the next call on, whatever was kept before."""
    if compiled and change == "a forward of the instance":
        pytest.skip("torch.compile does not look at it in stock modules either")
    x = _image(name, 4, device)
    torch.compiler.reset()
    for train in (False, True):
        module = _make(name, device).train(train)
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                module(x)
                module(x)
        changed = CHANGES[change](getattr(module, child)).train(train)
        setattr(module, child, changed)
        call = torch.compile(module, backend="aot_eager") if compiled else module
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                expected = _plain(copy.deepcopy(module), x)
                torch.testing.assert_close(call(x), expected, rtol=1e-4, atol=1e-5)


def test_a_norm_with_a_forward_of_the_instance_is_called(device):
    module, x = _make("ConvBN2d", device), _image("ConvBN2d", 4, device)
    module.bn1.forward = lambda x: x + 1
    torch.testing.assert_close(module(x), _plain(copy.deepcopy(module), x), rtol=1e-4, atol=1e-5)


def test_a_child_with_a_forward_of_its_own_in_a_sequence(device):
    chain = dsconv_cuda.DepthwiseSeparableSequence(*(dsconv_cuda.DepthwiseSeparableConvBN2d(4, 4, 3) for _ in range(3)))
    chain[1].depthwise = _of_class(Doubling)(chain[1].depthwise)
    x = torch.randn(2, 4, 9, 9, device=device)
    alone = nn.Sequential(*copy.deepcopy(chain)).to(device)
    torch.testing.assert_close(chain.to(device)(x), alone(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", BOTH_IN_2D)
def test_padding_mode_set_after_calls(name, device):
    module, x = _make(name, device).eval(), _image(name, 4, device)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            module(x)
            for mode in ("circular", "reflect", "zeros"):
                module.depthwise.padding_mode = mode
                for _ in range(2):
                    torch.testing.assert_close(module(x), _plain(module, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(
    ("attribute", "value"), [("stride", (2, 2)), ("stride", 2), ("padding", (1, 0)), ("padding", 1), ("groups", 2)]
)
@pytest.mark.parametrize("name", BOTH_IN_2D)
def test_a_second_convolution_that_is_not_pointwise_is_refused(name, attribute, value, train, device):
    module, x = _make(name, device).train(train), _image(name, 4, device)
    text = rf"DepthwiseSeparable{name}: \.pointwise must have {attribute} "
    if attribute != "groups":  # without weights for them PyTorch refuses them too
        for _ in range(2):
            module(x)
        setattr(module.pointwise, attribute, value)
        with pytest.raises(ValueError, match=text), torch.no_grad():
            module(x)
    module.pointwise = nn.Conv2d(4, 6, 1, **{attribute: value}).to(device)
    for _ in range(2):
        with pytest.raises(ValueError, match=text):
            module(x)


def test_a_second_convolution_that_is_larger_is_called_that(device):
    module, x = _make("ConvBN2d", device), _image("ConvBN2d", 4, device)
    module.pointwise = nn.Conv2d(4, 6, 3, padding=1).to(device)
    with pytest.raises(ValueError, match="pw_weight must be 1x1"):
        module(x)


def test_spellings_of_a_pointwise_convolution(device):
    module, x = _make("Conv2d", device), _image("Conv2d", 4, device)
    expected = module(x)
    for padding in ("same", "valid", 0, [0, 0]):
        module.pointwise.padding, module.pointwise.stride = padding, [1, 1]
        torch.testing.assert_close(module(x), expected)


# ---- attributes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_attributes_of_a_convolution(name):
    kind, dims = KINDS[name]
    module = kind(4, 6, 3, 2, 1, dilation=2, padding_mode="reflect")
    stock = CONVOLUTIONS[dims](4, 6, 3, 2, 1, dilation=2, padding_mode="reflect")
    for attribute in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "padding_mode"):
        assert getattr(module, attribute) == getattr(stock, attribute)
    module.depthwise.stride = (1,) * dims
    assert module.stride == (1,) * dims


@pytest.mark.parametrize("name", ["Conv1d", "ConvBN1d"])
def test_causal_padding_is_an_attribute(name):
    kind, _ = KINDS[name]
    assert kind(4, 6, 3, padding="causal").padding == "causal"
    with pytest.raises(ValueError, match=f"{kind.__name__}: padding 'causal' takes padding_mode 'zeros' only"):
        kind(4, 6, 3, padding="causal", padding_mode="reflect")


@pytest.mark.parametrize("bias", [2, (2, 2), "yes", None, 1])
@pytest.mark.parametrize("name", KINDS)
def test_a_bias_that_is_no_bool_is_refused(name, bias):
    """The sixth positional argument, which is dilation in nn.Conv2d."""
    kind, _ = KINDS[name]
    with pytest.raises(TypeError, match=rf"{kind.__name__}: bias must be True or False, got .*; dilation, the sixth"):
        kind(4, 6, 3, 1, 1, bias=bias)


def test_dilation_in_the_place_of_nn_conv2d_is_refused():
    assert nn.Conv2d(4, 4, 3, 1, 2, 2).dilation == (2, 2)
    with pytest.raises(TypeError, match="dilation=2"):
        dsconv_cuda.DepthwiseSeparableConv2d(4, 4, 3, 1, 2, 2)
