"""The networks of the papers: their layer tables, their published sizes, and that they compute what plain layers do."""

import re

import pytest
import torch
from torch import nn

from bench.saved import saved_bytes
from dsconv_cuda import DepthwiseSeparableConvBN2d, DepthwiseSeparableSequence, complexity, models
from dsconv_cuda.activations import ACTIVATIONS

pytestmark = [pytest.mark.usefixtures("isa"), pytest.mark.one_isa]


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("width", "millions"), [(1.0, 4.2), (0.75, 2.6), (0.5, 1.3), (0.25, 0.5)])
def test_mobilenet_parameters(width, millions):
    """arXiv:1704.04861, table 6."""
    assert round(_parameters(models.mobilenet_v1(width)) / 1e6, 1) == millions


def test_xception_parameters():
    """arXiv:1610.02357, table 3."""
    assert _parameters(models.xception()) == 22_855_952


def test_mobilenet_layers():
    """arXiv:1704.04861, table 1: output size of every depthwise and every pointwise layer."""
    sizes = {}

    def record(name):
        def hook(module, inputs, output):
            sizes[name] = tuple(output.shape[1:])

        return hook

    model = models.mobilenet_v1().to("meta")
    for name, module in (("stem", model.stem), *((i, block) for i, block in enumerate(model.blocks))):
        module.register_forward_hook(record(name))
    assert model(torch.empty(1, 3, 224, 224, device="meta")).shape == (1, 1000)
    expected = [(32, 112)]
    expected += [(64, 112), (128, 56), (128, 56), (256, 28), (256, 28), (512, 14)]
    expected += [(512, 14)] * 5 + [(1024, 7)] * 2
    assert list(sizes.values()) == [(c, side, side) for c, side in expected]
    strides = [block.depthwise.stride[0] for block in model.blocks]
    assert strides == [1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1]


def test_xception_layers():
    """arXiv:1610.02357, figure 5."""
    rows = complexity.table(models.xception(), (1, 3, 299, 299)).rows
    pairs = [row.output[1:3] for row in rows if "+" in row.kind]
    expected = [(128, 147)] * 2 + [(256, 74)] * 2 + [(728, 37)] * 2
    expected += [(728, 19)] * 25 + [(1024, 19), (1536, 10), (2048, 10)]
    assert pairs == expected
    assert rows[-1].output == (1, 1000)


def _stock(block, x):
    a = ACTIVATIONS[block.activation].value(block.bn1(block.depthwise(x)))
    return ACTIVATIONS[block.out_activation].value(block.bn2(block.pointwise(a)))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("build", [lambda: models.mobilenet_v1(0.25, 10), lambda: models.xception(10)])
def test_networks_compute_what_stock_layers_compute(build, training, device, monkeypatch):
    model = build().to(device, torch.float64).train(training)
    x = torch.randn(2, 3, 43, 43, device=device, dtype=torch.float64)
    y = model(x)
    gradients = torch.autograd.grad(y.sum(), list(model.parameters()))
    calls = []
    monkeypatch.setattr(DepthwiseSeparableSequence, "forward", nn.Sequential.forward)
    monkeypatch.setattr(
        DepthwiseSeparableConvBN2d, "forward", lambda block, x: (calls.append(block), _stock(block, x))[1]
    )
    expected = model(x)
    assert len(calls) == sum(isinstance(m, DepthwiseSeparableConvBN2d) for m in model.modules()) > 0
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected.sum(), list(model.parameters())))


def _older_names(state):
    """xception's state_dict as it was when its convolutions and norms stood in sequences by themselves."""
    older = {}
    for key, value in state.items():
        new = re.sub(r"^exit\.block\.", "exit.0.", key)
        if match := re.match(r"(.*)\bchain\.(\d+)\.(depthwise|pointwise|bn2)\.(.*)", new):
            prefix, block, child, name = match.groups()
            if prefix == "exit.":
                at, layers = 1 + 3 * int(block), ""
            else:
                at, layers = 3 * int(block) + (0 if prefix == "entry.0." else 1), "layers."
            new = f"{prefix}{layers}{at + 1}.{name}" if child == "bn2" else f"{prefix}{layers}{at}.{child}.{name}"
        older[new] = value
    return older


def test_xception_loads_older_names():
    model = models.xception(10)
    older = _older_names(model.state_dict())
    assert {"middle.3.layers.1.depthwise.weight", "entry.0.layers.1.running_var", "exit.0.layers.5.weight"} <= set(
        older
    )
    assert {"exit.1.pointwise.weight", "exit.5.weight", "entry.1.shortcut.1.bias"} <= set(older)
    other = models.xception(10)
    other.load_state_dict(older)
    for key, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[key], value), key
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"middle\.0\.layers\.9\.weight\""):
        other.load_state_dict({**older, "middle.0.layers.9.weight": torch.ones(1)})


def test_what_xception_keeps(isa, device):
    """Of a training step at most 65 % of the bytes of stock layers: residual blocks keep what they add up, and ReLU."""
    if isa == "emulated":
        pytest.skip("says the same on every backend, and takes long on this one")
    model = models.xception(10).to(device)
    x = torch.randn(1, 3, 75, 75, device=device).expand(2, -1, -1, -1).contiguous()
    kept = saved_bytes(model, lambda: model(x))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DepthwiseSeparableSequence, "forward", nn.Sequential.forward)
        one_by_one = saved_bytes(model, lambda: model(x))
        patch.setattr(DepthwiseSeparableConvBN2d, "forward", _stock)
        stock = saved_bytes(model, lambda: model(x))
    assert kept <= 0.85 * one_by_one
    assert kept <= 0.65 * stock


def test_width_must_be_positive():
    with pytest.raises(ValueError, match="width_mult"):
        models.mobilenet_v1(0)
