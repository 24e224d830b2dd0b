"""The networks of the papers: their layer tables, their published sizes, and that they compute what plain layers do."""

import pytest
import torch
from torch import nn

from dsconv_cuda import DepthwiseSeparableConv2d, complexity, models

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


def _stock(module, x):
    return module.pointwise(module.depthwise(x))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("build", [lambda: models.mobilenet_v1(0.25, 10), lambda: models.xception(10)])
def test_networks_compute_what_stock_layers_compute(build, training, device, monkeypatch):
    model = build().to(device, torch.float64).train(training)
    x = torch.randn(2, 3, 43, 43, device=device, dtype=torch.float64)
    y = model(x)
    gradients = torch.autograd.grad(y.sum(), list(model.parameters()))
    monkeypatch.setattr(DepthwiseSeparableConv2d, "forward", _stock)
    expected = model(x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected.sum(), list(model.parameters())))


def test_width_must_be_positive():
    with pytest.raises(ValueError, match="width_mult"):
        models.mobilenet_v1(0)
