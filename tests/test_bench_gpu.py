"""python -m bench --device cuda without a GPU: all of it but the device, of which a stand-in on the CPU is measured."""

import json
import time

import pytest
import torch

from bench import __main__ as command_line
from bench import gpu, gpu_report, layers
from bench.competitors import EAGER, FUSED, Form
from bench.device import CudaDevice, NoGpu, precision
from bench.problem import FORWARD, MODES, TRAINING

TINY = layers.parse("tiny 2 8 9x7 3x3 2 1 5 identity")


class StandIn:
    """A CudaDevice on the CPU: `wrong_graphs` replay something else, `small` runs out of memory in graphs."""

    name = "NVIDIA Stand-in (1/2) 80GB"
    torch_device = torch.device("cpu")

    def __init__(self, wrong_graphs=False, small=False):
        self.wrong_graphs, self.small, self.released = wrong_graphs, small, 0

    def describe(self):
        return {"gpu": self.name, "capability": "sm_90", "multiprocessors": 132, "l2_bytes": 50 << 20,
                "memory_bytes": 80 << 30, "driver": "1.2", "cuda": "13.0", "cudnn": 9}  # fmt: skip

    def planned_as(self):
        return "sm_90"

    def seconds(self, call, repeats):
        begin = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - begin) / repeats

    def copy_bandwidth(self):
        return 1e12

    def graph(self, call):
        if self.small:
            raise torch.cuda.OutOfMemoryError("no room\nfor graphs")
        return (lambda: tuple(result + 1 for result in call())) if self.wrong_graphs else call

    def peak_bytes(self, call):
        call()
        return 1 << 20

    def out_of_memory(self):
        return torch.cuda.OutOfMemoryError

    def release(self):
        self.released += 1


def run(device, modes=(FORWARD,), precisions=("float32",), methods=(FUSED, EAGER)):
    return gpu.run_gpu_suite(device, TINY, modes, precisions, rounds=2, least_seconds=1e-5, methods=methods)


def test_every_form_is_checked_measured_and_told():
    device = StandIn()
    result = run(device, MODES, ("float32", "tf32", "bfloat16"))
    assert device.released == len(result.measurements) == 3 * len(MODES)
    for m in result.measurements:
        assert {str(form) for form in m.samples} == {
            f"{method}{graph} {layout}"
            for method in (FUSED, EAGER)
            for graph in ("", gpu.GRAPH)
            for layout in ("channels_last", "nchw")
        }
        assert not m.wrong
        assert not m.refused
        assert m.predicted > 0
        ours, replayed = Form(FUSED, "nchw"), Form(FUSED + gpu.GRAPH, "nchw")
        eager = min(s.median for form, s in m.samples.items() if form.method == EAGER)
        assert m.gain(ours) == eager / m.samples[ours].median
        assert m.gain(replayed) == m.best([EAGER + gpu.GRAPH])[1] / m.samples[replayed].median
        assert m.bytes_per_second(ours) == m.problem.least_bytes / m.samples[ours].median
        assert set(m.peak_bytes) == {form for form in m.samples if not form.method.endswith(gpu.GRAPH)}
    text = gpu_report.page(result)
    assert "# NVIDIA Stand-in (1/2) 80GB" in text
    assert "## training, bfloat16" in text
    assert "A copy moves 1000 GB/s" in text
    assert "WRONG" not in text
    found = json.loads(gpu.to_json(result))
    precisions = [m["precision"] for m in found["measurements"]]
    assert precisions == [name for name in ("float32", "tf32", "bfloat16") for _ in MODES]
    forms = found["measurements"][0]["forms"]
    assert all(form["share_of_copy"] == form["bytes_per_second"] / 1e12 for form in forms)
    assert all((form["gain"] is not None) == form["method"].startswith(FUSED) for form in forms)


def test_a_wrong_result_is_not_timed_and_is_told():
    result = run(StandIn(wrong_graphs=True))
    (m,) = result.measurements
    assert not any(form.method.endswith(gpu.GRAPH) for form in m.samples)
    assert len(result.wrong) == 4
    assert "tiny, forward, float32, fused nchw" in result.wrong
    assert (
        "WRONG: tiny, forward, float32, fused nchw: tiny, forward: y of fused graph nchw is off by"
        in gpu_report.page(result)
    )


def test_a_form_that_fails_is_told_and_the_others_go_on():
    result = run(StandIn(small=True))
    (m,) = result.measurements
    assert not result.wrong
    assert len(m.samples) == 4
    assert m.refused["fused nchw"] == "out of memory: no room"
    assert "Not measured: fused nchw: out of memory: no room (tiny, forward, float32)" in gpu_report.page(result)


def test_from_the_arguments_to_the_files(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(layers, "GPU_LAYERS", TINY)
    monkeypatch.setattr(gpu, "RESULTS", tmp_path / "results")
    line = "--device cuda --layers tiny --mode forward --precision float16 --methods fused eager --rounds 1"
    arguments = command_line.parse_arguments([*line.split(), "--least-ms", "0.01"])
    assert gpu.main(arguments, StandIn()) == 0
    assert gpu.main(arguments, StandIn(wrong_graphs=True)) == 1
    stem = tmp_path / "results" / "nvidia-stand-in-1-2-80gb"
    assert json.loads(stem.with_suffix(".json").read_text())["measurements"][0]["precision"] == "float16"
    assert stem.with_suffix(".md").read_text().startswith("# NVIDIA Stand-in")
    assert "this page:" in capsys.readouterr().out


def test_the_defaults_on_a_gpu():
    arguments = command_line.parse_arguments(["--device", "cuda"])
    assert arguments.precision == ["float32", "tf32", "float16", "bfloat16"]
    assert all(layer.quick and layer in layers.GPU_LAYERS for layer in arguments.layers)


def test_layers_for_gpus():
    assert len({layer.name for layer in (*layers.LAYERS, *layers.GPU_LAYERS)}) == 41 + len(layers.GPU_LAYERS)
    assert [layer.multiplier for layer in layers.select("mobileclip_64_n8,mbv1_b01", gpu=True)] == [2, 1]
    for layer in layers.GPU_LAYERS:
        kept = tuple((size - 1) // layer.stride + 1 for size in (layer.height, layer.width))
        assert layer.out_size == kept, layer.name


def test_precision_is_set_and_given_back():
    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32, cudnn.benchmark
    for name in ("tf32", "float32"):
        with precision(name):
            assert (cudnn.allow_tf32, cudnn.benchmark) == (name == "tf32", True)
    assert before == (cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32, cudnn.benchmark)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_error_says_so():
    with pytest.raises(NoGpu, match="--device cuda needs a GPU, and "):
        CudaDevice()
    with pytest.raises(SystemExit, match="--device cuda needs a GPU"):
        command_line.main(["--device", "cuda"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_device_itself():
    device = CudaDevice()
    result = gpu.run_gpu_suite(device, TINY, (FORWARD, TRAINING), ("float32", "tf32", "float16"), rounds=2,
                               least_seconds=1e-4, methods=(FUSED, EAGER))  # fmt: skip
    assert not result.wrong, result.wrong
    assert not any(m.refused for m in result.measurements)
    assert result.bandwidth > 1e10


def test_arguments_of_the_cpu_are_refused(capsys):
    with pytest.raises(SystemExit):
        command_line.parse_arguments(["--device", "cuda", "--sweep", "3"])
    assert "--sweep, --peers and --isa are for the CPU" in capsys.readouterr().err


def test_file_names():
    assert gpu.file_stem("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
