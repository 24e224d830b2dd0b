"""The benchmark's arithmetic against hand-computed values, and one tiny run from end to end."""

import json
import re

import pytest
import torch
from fresh_process import ROOT

from bench import __main__ as command_line
from bench import compare, compiled, layers, overhead, peers, report, suite, sweep
from bench.ceilings import Ceilings, cache_sizes, measure_ceilings
from bench.competitors import COMPILED, EAGER, FUSED, Arena, Form, WrongResult
from bench.problem import FORWARD, MODES, TRAINING, TRAINING_BN, Problem, inner_taps
from bench.timing import CpuClock, WallClock, measure

TINY = layers.parse("tiny 2 8 9x7 3x3 2 1 5 identity")[0]


def test_layers_parse():
    assert len(layers.LAYERS) == 41
    assert len({layer.name for layer in layers.LAYERS}) == 41
    assert len(layers.select("quick")) == 6
    layer = layers.select("effb0_k5_672x14s2_192")[0]
    assert (layer.batch, layer.channels, layer.height, layer.width, layer.kernel) == (1, 672, 14, 14, (5, 5))
    assert (layer.stride, layer.dilation, layer.out_channels, layer.out_activation) == (2, 1, 192, "identity")
    assert (layer.padding, layer.out_size) == ((2, 2), (7, 7))


def test_volumes_stand_before_their_frames():
    volumes = layers.select("volumes")
    for volume, frames in zip(volumes[::2], volumes[1::2], strict=True):
        assert frames.name == f"{volume.name}_frames"
        assert (volume.kernel, frames.kernel) == ((3, 3, 3), (3, 3))
        assert (frames.channels, frames.out_channels) == (volume.channels, volume.out_channels)
        assert (frames.batch, frames.size) == (volume.batch * volume.depth, volume.size[1:])


def test_padding_keeps_the_map_at_stride_one():
    for layer in layers.LAYERS:
        halved = tuple((size - 1) // layer.stride + 1 for size in (layer.height, layer.width))
        assert layer.out_size == halved, layer.name


def test_unknown_layers_are_named():
    with pytest.raises(ValueError, match="no layer mbv9, x; there are: quick, all, rows, volumes, mbv1_b01"):
        layers.select("mbv1_b01,mbv9,x")
    with pytest.raises(ValueError, match="layer a: unknown mark"):
        layers.parse("a 1 8 9x7 3x3 2 1 5 identity slow")


@pytest.mark.parametrize(
    ("size", "size_out", "kernel", "stride", "dilation", "padding", "expected"),
    [
        (5, 5, 3, 1, 1, 1, 13),  # 15 taps, one outside on either side
        (5, 3, 3, 2, 1, 1, 7),  # centres 0, 2, 4: the outer two lose one
        (4, 2, 3, 2, 1, 1, 5),  # centres 0, 2: the first loses one
        (5, 5, 3, 1, 2, 2, 11),  # 0 and 1 lose the left tap, 3 and 4 the right one
        (1, 1, 31, 1, 1, 15, 1),
        (6, 4, 3, 1, 1, 0, 12),  # no padding
    ],
)
def test_taps_in_the_padding_are_not_counted(size, size_out, kernel, stride, dilation, padding, expected):
    assert inner_taps(size, size_out, kernel, stride, dilation, padding) == expected


def test_flops_and_bytes_of_a_tiny_layer():
    # 9 x 7 with stride 2 -> 5 x 4; taps: rows 2+3+3+3+2 = 13, columns 2+3+3+2 = 10
    depthwise, pointwise = 2 * 8 * 13 * 10, 2 * 8 * 5 * 20
    forward, training = (Problem(TINY, mode, torch.float32) for mode in (FORWARD, TRAINING))
    assert forward.flops == 2 * (depthwise + pointwise)
    assert training.flops == 3 * forward.flops
    x, y, weights, biases = 2 * 8 * 63, 2 * 5 * 20, 8 * 9 + 8 * 5, 8 + 5
    assert forward.least_bytes == 4 * (x + y + weights + biases)
    assert training.least_bytes == 4 * (3 * x + 2 * y + 3 * weights + 2 * biases)
    assert Problem(TINY, FORWARD, torch.bfloat16).least_bytes == forward.least_bytes // 2


def test_a_channel_multiplier_counts_between_the_convolutions_only():
    single = Problem(layers.Layer("one", 2, 8, 9, 7, (3, 3), 2, 1, 5, "identity"), FORWARD, torch.float32)
    double = Problem(layers.Layer("two", 2, 8, 9, 7, (3, 3), 2, 1, 5, "identity", 2), FORWARD, torch.float32)
    assert double.flops == 2 * single.flops
    assert double.least_bytes - single.least_bytes == 4 * 8 * (9 + 5 + 1)
    Arena(double).check({form: Arena(double).call(form) for form in (Form(FUSED, "nchw"), Form(EAGER, "nchw"))})


def test_flops_of_a_layer_without_padded_taps_in_one_dimension():
    conformer = Problem(layers.select("conformer_k31")[0], FORWARD, torch.float32)
    # 31 taps at each of 400 places, without 15 + 14 + ... + 1 on either side
    assert conformer.flops == 2 * 256 * (31 * 400 - 15 * 16) + 2 * 256 * 256 * 400


def test_the_limit_is_the_larger_of_arithmetic_and_memory():
    problem = Problem(TINY, FORWARD, torch.float32)

    def ceilings(fma, capacity):
        return Ceilings(
            1, {"a": {"float32": fma / 2, "float64": fma / 4}, "b": {"float32": fma, "float64": fma / 2}}, 0.0,
            {"L2": 100.0, "L3": 50.0, "DRAM": 10.0}, capacity,
        )  # fmt: skip

    size = problem.least_bytes
    assert problem.limit(ceilings(1e-3, {"L2": 1 << 20, "L3": 1 << 30})) == (problem.flops / 1e-3, "FMA")
    assert problem.limit(ceilings(1e30, {"L2": size, "L3": 1 << 30})) == (size / 100, "L2")
    assert problem.limit(ceilings(1e30, {"L2": size - 1, "L3": size})) == (size / 50, "L3")
    assert problem.limit(ceilings(1e30, {"L2": 1, "L3": 2})) == (size / 10, "DRAM")
    double = Problem(TINY, FORWARD, torch.float64)
    assert double.limit(ceilings(1e-3, {"L2": 1 << 20, "L3": 1 << 30})) == (double.flops / 0.5e-3, "FMA")


def test_ceilings_are_positive_and_ordered():
    measured = measure_ceilings(1, seconds=0.02)
    assert all(rate > 1e8 for rates in measured.fma.values() for rate in rates.values())
    assert all(rate > 1e8 for rate in measured.bandwidth.values())
    assert list(measured.bandwidth) == ["L2", "L3", "DRAM"]
    sizes, _ = cache_sizes()
    assert 0 < sizes["L2"] <= measured.capacity["L2"]
    assert measured.flops(torch.float32) >= measured.flops(torch.float64)
    assert measured.best(measured) == measured


def test_measure_calls_everything_in_every_round():
    counts = {"a": 0, "b": 0}

    class Clock:
        def seconds(self, call, repeats):
            for _ in range(repeats):
                call()
            return 0.5

    def counter(name):
        def call():
            counts[name] += 1

        return call

    samples = measure({name: counter(name) for name in counts}, rounds=4, least_seconds=1.0, clock=Clock())
    assert counts == {"a": 3 + 4 * 2, "b": 3 + 4 * 2}
    assert samples["a"].median == samples["a"].p10 == samples["a"].p90 == 0.5
    assert WallClock().seconds(lambda: None, 3) > 0
    assert CpuClock().seconds(lambda: None, 3) >= 0


@pytest.mark.parametrize("mode", MODES)
def test_a_wrong_competitor_is_not_timed(mode):
    arena = Arena(Problem(TINY, mode, torch.float32))
    right = arena.call(Form(EAGER, "nchw"))
    arena.check({Form(EAGER, "nchw"): right})

    def wrong():
        *others, last = right()
        return (*others, last * (1 + 1e-4))

    with pytest.raises(WrongResult, match=r"tiny, .* of fused nchw is off by"):
        arena.check({Form(FUSED, "nchw"): wrong})


def test_at_a_corner_of_relu6_both_derivatives_are_right():
    """Of this layer's 400,000 values before ReLU6 one is within rounding of the corner."""
    layer = layers.parse("corner 1 32 112x112 3x3 1 1 16 identity")[0]
    arena = Arena(Problem(layer, TRAINING_BN, torch.float32))
    arena.check({form: arena.call(form) for form in (Form(FUSED, "nchw"), Form(EAGER, "nchw"))})


@pytest.mark.parametrize(
    "layer",
    [
        "channels 1 1024 7x7 3x3 1 1 1024 identity",
        "row 1 64 1x1600 1x31 1 1 64 identity",
        "row_of_pairs 1 64 1x1600 3x3 1 1 64 identity",
    ],
)
def test_long_sums_stay_within_the_budget(layer):
    """Many products in one accumulator are further from fp64 than PyTorch, which sums in parts."""
    for mode in (FORWARD, TRAINING):
        arena = Arena(Problem(layers.parse(layer)[0], mode, torch.float32))
        arena.check({form: arena.call(form) for form in (Form(FUSED, "nchw"), Form(FUSED, "channels_last"))})


def test_calls_keep_the_layout():
    for layout, memory_format in (("nchw", torch.contiguous_format), ("channels_last", torch.channels_last)):
        for method in (FUSED, EAGER):
            results = Arena(Problem(TINY, TRAINING, torch.float32)).call(Form(method, layout))()
            assert results[0].is_contiguous(memory_format=memory_format), (method, layout)


def test_end_to_end(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(layers, "LAYERS", (TINY,))
    target = tmp_path / "folder" / "bench.json"
    command_line.main(
        ["--layers", "tiny", "--threads", "1", "--rounds", "1", "--least-ms", "0.1", "--json", str(target)]
    )
    text = capsys.readouterr().out
    assert "forward, float32, 1 thread(s)" in text
    assert "training, float32, 1 thread(s)" in text
    assert "training_bn, float32, 1 thread(s)" in text
    found = json.loads(target.read_text())
    assert len(found["measurements"]) == 3
    for measurement in found["measurements"]:
        assert {form["method"] for form in measurement["forms"]} == {FUSED, EAGER, COMPILED}
        assert len(measurement["forms"]) == 6
        assert all(form["times_limit"] > 0 and form["median"] > 0 for form in measurement["forms"])
        assert all((form["gain"] is not None) == (form["method"] == FUSED) for form in measurement["forms"])
    assert [ceilings["threads"] for ceilings in found["ceilings"]] == [1]


def test_only_our_own_form_with_one_thread_and_two():
    threads_before = torch.get_num_threads()
    result = suite.run_suite(
        [Problem(TINY, FORWARD, torch.float64)],
        suite.Entrants(methods=(FUSED,), layouts=("nchw",)),
        suite.Timing(rounds=2, least_seconds=1e-5, clock="cpu"),
        threads=[1, 2],
        allocator="",
        starting=lambda text: None,
        finished=lambda: None,
    )
    assert [measurement.threads for measurement in result.measurements] == [1, 2]
    assert torch.get_num_threads() == threads_before
    for measurement in result.measurements:
        assert list(measurement.samples) == [Form(FUSED, "nchw")]
        assert measurement.gains() == {}


class FakePeer:
    """Computes what it is told to, in a layout of its own."""

    def __init__(self, change):
        self.change = change

    def versions(self):
        return {"fake": "1.0"}

    def prepare(self, arena, threads):
        if isinstance(self.change, Exception):
            raise self.change
        right = arena.call(Form(EAGER, "nchw"))
        return {peers.BLOCKED: peers.Call(right, lambda results: (results[0] * self.change,))}


def test_peers_are_checked_and_compared():
    result = suite.run_suite(
        [Problem(TINY, FORWARD, torch.float32)],
        suite.Entrants(
            methods=(FUSED, EAGER),
            layouts=("channels_last",),
            peers={
                "right": FakePeer(1),
                "wrong": FakePeer(1.01),
                "unable": FakePeer(peers.CannotDo("no forward")),
                "broken": FakePeer(OSError("no such engine")),
            },
            missing_peers=("absent",),
        ),
        suite.Timing(rounds=1, least_seconds=1e-5, clock="wall"),
        threads=[1],
        allocator="",
        starting=lambda text: None,
        finished=lambda: None,
    )
    (measurement,) = result.measurements
    assert [form for form in measurement.samples if form.is_peer] == [Form("right", "blocked")]
    assert measurement.refused["unable"] == "no forward"
    assert measurement.refused["broken"] == "tiny, forward: OSError: no such engine"
    assert "y of wrong blocked is off by" in measurement.refused["wrong"]
    assert measurement.best_peer()[0] == Form("right", "blocked")
    assert measurement.best_pytorch()[0].method == EAGER
    others = [sample.median for form, sample in measurement.samples.items() if form.method != FUSED]
    ours = Form(FUSED, "channels_last")
    assert measurement.over_best()[ours] == measurement.samples[ours].median / min(others)
    text = "\n".join([report.header(result), *report.tables(result), report.summary(result)])
    assert "peers: fake 1.0; not installed: absent" in text
    assert "ours and the fastest of the others" in text
    assert "unable, -: no forward" in text
    found = json.loads(report.to_json(result))["measurements"][0]
    assert found["best_peer"]["method"] == "right"
    assert set(found["refused"]) == {"wrong", "unable", "broken"}


@pytest.mark.parametrize("name", peers.NAMES)
def test_peers_that_are_installed_give_the_right_result(name):
    present, missing = peers.find_peers([name])
    if name in missing:
        pytest.skip(f"{name} is not installed")
    for stride, out_activation in ((1, "relu6"), (2, "identity")):
        layer = layers.Layer("small", 2, 16, 9, 7, (3, 5), stride, 1, 24, out_activation)
        arena = Arena(Problem(layer, FORWARD, torch.float32))
        calls = present[name].prepare(arena, 1)
        arena.check({Form(name, layout): lambda call=call: call.results(call.run()) for layout, call in calls.items()})


def test_slow_peers_are_named_and_not_timed(monkeypatch):
    monkeypatch.setattr(suite, "SLOW_SECONDS", 0.0)
    monkeypatch.setattr(suite, "SLOW", 0.0)
    arena = Arena(Problem(TINY, FORWARD, torch.float32))
    with pytest.raises(peers.CannotDo, match=r"tiny, forward: .* x PyTorch's time"):
        suite._checked_calls(arena, FakePeer(1), "slow", 1, reference=1e-6)


def test_the_random_layers_are_those_of_the_seed_and_can_be_computed():
    drawn = sweep.random_layers(60, seed=1)
    assert drawn == sweep.random_layers(60, seed=1) != sweep.random_layers(60, seed=2)
    for attribute, values in (("stride", {1, 2, 3}), ("dilation", {1, 2}), ("multiplier", {1, 2})):
        assert {getattr(layer, attribute) for layer in drawn} == values
    assert {3, 17, 37, 113} <= {layer.channels for layer in drawn}
    assert any(layer.height == 1 for layer in drawn)
    assert all(min(layer.out_size) >= 1 for layer in drawn)


def test_a_sweep_from_end_to_end(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sweep, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(sweep, "MOST_SECONDS", 1e-5)
    target = tmp_path / "sweep.json"
    command_line.main(["--sweep", "2", "--threads", "1", "--rounds", "1", "--least-ms", "0.1", "--json", str(target)])
    text = capsys.readouterr().out
    assert "training, float32, 1 thread(s), 2 random layers: multiples of the limit, worst first" in text
    assert "CL: geometric mean" in text
    assert len(json.loads(target.read_text())["measurements"]) == 6


def test_overheads_are_told_above_an_empty_op():
    rows = overhead.overheads((1, 1, 1), rounds=2, least_seconds=1e-5)
    assert rows[0][0] == overhead.EMPTY
    assert rows[0][2] == 0
    assert [row[0] for row in rows[1:4]] == [
        "torch.ops.dsconv_cuda.fwd",
        "depthwise_separable_conv2d",
        "DepthwiseSeparableConv2d",
    ]
    assert all(total > 0 for _, total, _ in rows)
    rows = overhead.overheads((1, 1, 1), rounds=2, least_seconds=1e-5, training=True)
    assert [row[0] for row in rows[:2]] == [overhead.EMPTY_FUNCTION, "torch.ops.dsconv_cuda.fwd and bwd"]
    assert "DepthwiseSeparableConv2d" in [what for what, _, _ in rows]
    assert all(total > 0 for _, total, _ in rows)


def test_what_compiled_stacks_cost_is_told():
    few = {"rounds": 1, "least_seconds": 1e-5, "backend": "aot_eager"}
    text = compiled.table([(1, 4, 3)], ["DepthwiseSeparableConvBN2d", "nn.Linear"], **few)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[2:]]
    assert [row[:3] for row in rows] == [
        ["DepthwiseSeparableConvBN2d", "1x4x3", "inference"],
        ["nn.Linear", "1x4", "inference"],
        ["DepthwiseSeparableConvBN2d", "1x4x3", "training"],
        ["nn.Linear", "1x4", "training"],
    ]
    for row in rows:
        eager, compiled_one, _, _, ratio = map(float, row[3:])
        assert ratio == pytest.approx(compiled_one / eager, rel=0.1, abs=0.1)


def test_two_checkouts_are_compared(capfd):
    few = ["--processes", "1", "--rounds", "1", "--least-ms", "0.1"]
    compare.main(
        [str(ROOT), str(ROOT), "--layers", "mbv2_192x28s2_64", "--ops", "fwd", "z_moments", "--batch", "2", *few]
    )
    table = capfd.readouterr().out
    assert re.search(r"\| layer +\| +fwd \| +z_moments \|", table)
    before, after, ratio = map(float, re.search(r"mbv2_192x28s2_64 \| +(\d+) -> (\d+) +([\d.]+) \|", table).groups())
    assert min(before, after, ratio) > 0


@pytest.mark.parametrize(
    ("path", "reason"),
    [(None, "is no checkout of this project"), (ROOT, "make build there")],
    ids=["none", "elsewhere"],
)
def test_a_folder_without_a_build_of_its_own_is_an_error(path, reason, tmp_path, monkeypatch, capfd):
    """Where Python finds no dsconv_cuda, and where it finds that of another folder."""
    monkeypatch.setenv("PYTHONPATH", str(path or ""))
    with pytest.raises(RuntimeError, match="ended with 1"):
        compare.main([str(tmp_path), str(tmp_path), "--layers", "mbv2_192x28s2_64", "--ops", "fwd"])
    assert reason in capfd.readouterr().err


def test_the_limit_of_an_instruction_set():
    measured = measure_ceilings(1, seconds=0.02, isa="generic")
    assert len(measured.fma) == 1
    assert measured.flops(torch.bfloat16) == measured.flops(torch.float32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--device cuda --peers", "are for the CPU"),
        ("--clock cpu --threads 2", "use it with --threads 1"),
        ("--isa avx9", "invalid choice: 'avx9'"),
        ("--peers tensorflow", "invalid choice: 'tensorflow'"),
        ("--layers nothing", "no layer nothing; there are: quick, all"),
    ],
)
def test_arguments_are_refused_in_words(arguments, message, capsys):
    with pytest.raises(SystemExit):
        command_line.parse_arguments(arguments.split())
    assert message in capsys.readouterr().err
