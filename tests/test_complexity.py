"""The formulas against counted multiply-adds, and the table against what is known of whole networks."""

import csv
import io
import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import dsconv_cuda
from dsconv_cuda import DepthwiseSeparableConv2d, complexity, models

LAYER = (14, 32, 48, 3)


def test_formulas():
    assert complexity.standard_macs(*LAYER) == 14 * 14 * 32 * 48 * 9
    assert complexity.depthwise_macs(*LAYER) == 14 * 14 * 32 * 9
    assert complexity.pointwise_macs(*LAYER) == 14 * 14 * 32 * 48
    assert complexity.separable_macs(*LAYER) == 14 * 14 * 32 * (9 + 48)
    assert complexity.ratio(*LAYER) == pytest.approx(1 / 48 + 1 / 9)


@pytest.mark.parametrize("layer", [LAYER, (7, 3, 1000, 5), ((1, 400), 256, 256, (1, 31)), ((4, 8, 8), 6, 5, (3, 3, 3))])
def test_the_ratio_is_that_of_the_counts(layer):
    assert complexity.ratio(*layer) == pytest.approx(
        complexity.separable_macs(*layer) / complexity.standard_macs(*layer)
    )


def test_the_saving_grows_with_the_output_channels_and_the_kernel():
    by_channels = [complexity.ratio(14, 32, n, 3) for n in (1, 8, 64, 512)]
    by_kernel = [complexity.ratio(14, 32, 64, k) for k in (1, 3, 5, 7)]
    assert by_channels == sorted(by_channels, reverse=True)
    assert by_kernel == sorted(by_kernel, reverse=True)


@pytest.mark.parametrize(
    ("module", "size"),
    [
        (nn.Conv2d(6, 10, (3, 5), (2, 1), 1, groups=2), (3, 6, 9, 11)),
        (nn.Conv1d(4, 4, 3, groups=4), (2, 4, 9)),
        (nn.Conv3d(2, 4, 3), (2, 2, 5, 6, 7)),
        (nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 36, 7)), (2, 3, 8, 8)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_macs_are_those_that_pytorch_counts(module, size):
    with FlopCounterMode(display=False) as counter:
        module(torch.randn(size))
    assert 2 * complexity.table(module, size).macs == counter.get_total_flops()


def test_a_fused_layer():
    module = DepthwiseSeparableConv2d(6, 10, (3, 5), (2, 1), (1, 2), True, channel_multiplier=2)
    (row,) = complexity.table(module, (2, 6, 8, 9), dtype=torch.bfloat16).rows
    x, z, y = 2 * 6 * 8 * 9, 2 * 12 * 4 * 9, 2 * 10 * 4 * 9
    dw, pw = 12 * 15 + 12, 120 + 10
    assert row.output == (2, 10, 4, 9)
    assert row.macs == z * 15 + y * 12
    assert row.parameters == dw + pw
    assert [work.bytes for work in row.unfused] == [2 * (x + z + dw), 2 * (z + y + pw)]
    assert row.bytes_fused == 2 * (x + y + dw + pw)
    assert row.fused.intensity == 2 * row.macs / row.bytes_fused


@pytest.mark.parametrize("multiplier", [1, 2])
@pytest.mark.parametrize("size", [(2, 8, 50), (2, 8, 12, 10), (2, 8, 6, 10, 9)])
def test_a_pair_is_the_sum_of_its_layers_in_every_dimension(size, multiplier):
    dims = len(size) - 2
    kind = getattr(dsconv_cuda, f"DepthwiseSeparableConv{dims}d")
    module = kind(8, 20, 3, 2, 1, True, channel_multiplier=multiplier)
    depthwise = complexity.table(module.depthwise, size)
    between = depthwise.rows[0].output
    pointwise = complexity.table(module.pointwise, between)
    stock = nn.Sequential(module.depthwise, nn.ReLU(), module.pointwise)
    for table in (complexity.table(module, size), complexity.table(stock, size)):
        (row,) = table.rows
        assert row.macs == depthwise.macs + pointwise.macs
        assert row.bytes_unfused == depthwise.bytes_unfused + pointwise.bytes_unfused
        assert row.bytes_fused == row.bytes_unfused - 2 * 4 * math.prod(between)


def test_bounds_are_those_of_the_machine():
    module, size = DepthwiseSeparableConv2d(64, 64, 3, 1, 1), (1, 64, 56, 56)
    fast_memory, slow_memory = complexity.Machine(1e9, 1e12), complexity.Machine(1e12, 1e9)
    (row,) = complexity.table(module, size).rows
    assert row.fused.bound(fast_memory) == "compute"
    assert row.fused.bound(slow_memory) == "memory"
    assert row.fused.seconds(slow_memory) == row.bytes_fused / 1e9
    # Where memory is the limit, the time saved is the bytes saved; where it is not, nothing is.
    for machine, gain in ((slow_memory, row.bytes_unfused / row.bytes_fused), (fast_memory, 1.0)):
        table = complexity.table(module, size, machine=machine)
        record = next(csv.DictReader(io.StringIO(table.csv())))
        assert float(record["gain"]) == pytest.approx(gain, abs=1e-3)


@pytest.mark.parametrize(("width", "millions"), [(1.0, 569), (0.75, 325), (0.5, 149), (0.25, 41)])
def test_mobilenet_has_the_multiply_adds_of_the_paper(width, millions):
    """arXiv:1704.04861, table 6."""
    table = complexity.table(models.mobilenet_v1(width), (1, 3, 224, 224))
    assert round(table.macs / 1e6) == millions
    assert sum("+" in row.kind for row in table.rows) == 13


def test_fused_and_not_yet_fused_models_have_one_table():
    model = nn.Sequential(
        nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 4, 3)
    )
    table = complexity.table(model, (1, 8, 9, 9))
    assert [row.name for row in table.rows] == ["0", "4"]
    assert table.rows[0].bytes_unfused - table.rows[0].bytes_fused == 2 * 4 * 8 * 81
    assert table.other_parameters == 16
    assert str(complexity.table(dsconv_cuda.fuse(model), (1, 8, 9, 9))) == str(table)


def test_the_model_is_not_touched():
    model = models.mobilenet_v1(0.25)
    model.blocks[0].eval()
    modes = [m.training for m in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    table = complexity.table(model, (1, 3, 32, 32))
    assert table.parameters == sum(p.numel() for p in model.parameters())
    assert [m.training for m in model.modules()] == modes
    assert not any(m._forward_hooks for m in model.modules())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_text_and_csv_hold_every_row():
    table = complexity.table(models.ExampleNet(), (1, 3, 32, 32))
    records = list(csv.DictReader(io.StringIO(table.csv())))
    assert [r["layer"] for r in records] == ["conv1", "dsconv", "conv2", "total"]
    assert sum(int(r["MACs"]) for r in records[:-1]) == int(records[-1]["MACs"]) == table.macs
    assert records[1]["bound unfused"].count("+") == 1
    lines = str(table).splitlines()
    assert all(r["layer"] in str(table) for r in records)
    assert f"{table.macs:,}" in lines[-1]
    assert lines[0].split()[0] == "layer"


def test_plot(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is an optional dependency")
    path = tmp_path / "roofline.png"
    figure = complexity.table(models.ExampleNet(), (1, 3, 32, 32)).plot(path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert {"pair, unfused", "pair, fused", "other layer"} <= set(figure.axes[0].get_legend_handles_labels()[1])


def test_plot_without_matplotlib_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        complexity.table(nn.Linear(2, 3), (1, 2)).plot(tmp_path / "never.png")
