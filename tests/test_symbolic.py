"""torch.fx.symbolic_trace of models that hold the package's modules."""

import copy

import pytest
import torch
from torch import fx, nn

import dsconv_cuda

pytestmark = [pytest.mark.usefixtures("isa"), pytest.mark.one_isa]


class Scaled(dsconv_cuda.DepthwiseSeparableConv2d):
    def forward(self, x):
        return 3 * super().forward(x)


class ScaledBlock(dsconv_cuda.DepthwiseSeparableConvBN2d):
    def forward(self, x):
        return 3 * super().forward(x)


class ScaledSequence(dsconv_cuda.DepthwiseSeparableSequence):
    def forward(self, x):
        return 3 * super().forward(x)


def _block(kind, **kwargs):
    return kind(4, 4, 3, padding=1, activation="relu6", out_activation="silu", **kwargs)


MODULES = {
    "Conv1d": lambda: _block(dsconv_cuda.DepthwiseSeparableConv1d),
    "Conv1d, causal": lambda: dsconv_cuda.DepthwiseSeparableConv1d(4, 4, 3, padding="causal"),
    "Conv2d": lambda: _block(dsconv_cuda.DepthwiseSeparableConv2d),
    "Conv2d, circular": lambda: _block(dsconv_cuda.DepthwiseSeparableConv2d, padding_mode="circular"),
    "Conv3d": lambda: _block(dsconv_cuda.DepthwiseSeparableConv3d),
    "ConvBN1d": lambda: _block(dsconv_cuda.DepthwiseSeparableConvBN1d),
    "ConvBN2d": lambda: _block(dsconv_cuda.DepthwiseSeparableConvBN2d),
    "ConvBN3d": lambda: _block(dsconv_cuda.DepthwiseSeparableConvBN3d),
    "sequence": lambda: dsconv_cuda.DepthwiseSeparableSequence(
        *(_block(dsconv_cuda.DepthwiseSeparableConvBN2d) for _ in range(2))
    ),
}
SUBCLASSES = {
    "Scaled": lambda: _block(Scaled),
    "ScaledBlock": lambda: _block(ScaledBlock),
    "ScaledSequence": lambda: ScaledSequence(*(_block(dsconv_cuda.DepthwiseSeparableConvBN2d) for _ in range(2))),
}


def _image(module, device) -> torch.Tensor:
    convolution = next(m for m in module.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d)))
    return torch.randn(2, 4, *(6, 5, 7)[: len(convolution.kernel_size)], device=device)


def _check(module, traced, x):
    """The same results in training and in evaluation, with and without gradients."""
    for train in (True, False):
        module.train(train)
        traced.train(train)
        for grad in (True, False, False):
            with torch.set_grad_enabled(grad):
                torch.testing.assert_close(traced(x), module(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dict(traced.named_buffers()), dict(module.named_buffers()))


@pytest.mark.parametrize("name", MODULES)
def test_a_module_is_one_call_in_a_graph(name, device):
    net = nn.Sequential(MODULES[name](), nn.ReLU()).to(device)
    net(_image(net, device))  # with what is kept
    traced = fx.symbolic_trace(copy.deepcopy(net))
    assert [(n.op, n.target) for n in traced.graph.nodes][1:-1] == [("call_module", "0"), ("call_module", "1")]
    assert type(traced.get_submodule("0")) is type(net[0])
    _check(net, traced, _image(net, device))


@pytest.mark.parametrize("name", [*MODULES, *SUBCLASSES])
def test_a_module_that_is_traced_itself_is_its_children(name, device):
    module = (MODULES | SUBCLASSES)[name]().to(device)
    _check(module, fx.symbolic_trace(copy.deepcopy(module)), _image(module, device))


@pytest.mark.parametrize("name", SUBCLASSES)
def test_the_forward_of_a_subclass_is_recorded(name, device):
    net = nn.Sequential(SUBCLASSES[name](), nn.ReLU()).to(device)
    _check(net, fx.symbolic_trace(copy.deepcopy(net)), _image(net, device))


def test_mobilenet(device):
    net = dsconv_cuda.models.mobilenet_v1(0.25, 10).to(device)
    traced = fx.symbolic_trace(copy.deepcopy(net))
    assert "blocks" in {n.target for n in traced.graph.nodes}
    _check(net, traced, torch.randn(2, 3, 64, 64, device=device))


def test_xception_is_traced():
    net = dsconv_cuda.models.xception(10)
    traced = fx.symbolic_trace(net)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(traced.eval()(x), net.eval()(x))
