"""python -m bench --device cuda: the fused op on a GPU against PyTorch eager and compiled, in either layout.

    make bench-cuda                                          # quick layers, every precision; writes the report
    python -m bench --device cuda --layers all
    python -m bench --device cuda --layers convnext_s1_n64 --precision float16 --mode forward

Every form is checked first, against float64 on the same GPU with twice PyTorch's own error in the same precision; one
that is wrong is not timed, is told, and makes the exit status 1. Times are by the GPU's own clock with the L2 emptied
before each repeat, rounds of all forms interleaved. Fused and eager forms are also replayed from CUDA graphs. GB/s are
the problem's least bytes over the time; the bandwidth of a large copy is measured in the same run.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from .competitors import COMPILED, EAGER, FUSED, PYTORCH, Arena, Form, WrongResult
from .device import CudaDevice, precision
from .environment import describe
from .plain import LAYOUTS
from .problem import DTYPES, Problem
from .timing import Sample, measure

METHODS = (FUSED, EAGER, COMPILED)
REPLAYED = (FUSED, EAGER)  # torch.compile's own graphs are another mode of it
GRAPH = " graph"  # a method replayed from a CUDA graph is called by its name and this
PRECISIONS = {"float32": "float32", "tf32": "float32", "float16": "float16", "bfloat16": "bfloat16"}
RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class GpuMeasurement:
    problem: Problem
    precision: str
    samples: dict[Form, Sample]
    peak_bytes: dict[Form, int]
    predicted: float | None  # seconds, by the planner
    wrong: dict[str, str] = field(default_factory=dict)  # form -> what is wrong with its result
    refused: dict[str, str] = field(default_factory=dict)  # form -> why it has no sample

    def best(self, methods):
        """(form, seconds) of the fastest form of these methods; None where there is none."""
        medians = {form: sample.median for form, sample in self.samples.items() if form.method in methods}
        return min(medians.items(), key=lambda item: item[1], default=None)

    def gain(self, form):
        """The time of PyTorch's fastest form over that of this one, both replayed or both not."""
        replayed = form.method.endswith(GRAPH)
        best = self.best([EAGER + GRAPH] if replayed else PYTORCH)
        return best[1] / self.samples[form].median if best and form in self.samples else None

    def bytes_per_second(self, form):
        return self.problem.least_bytes / self.samples[form].median


@dataclass(frozen=True)
class GpuResult:
    environment: dict
    copy_bandwidth: tuple[float, float]  # before and after the layers
    measurements: list[GpuMeasurement]

    @property
    def bandwidth(self):
        return max(self.copy_bandwidth)

    @property
    def wrong(self):
        return {f"{m.problem.layer.name}, {m.problem.mode}, {m.precision}, {form}": text
                for m in self.measurements for form, text in m.wrong.items()}  # fmt: skip


def run_gpu_suite(
    device, layers, modes, precisions, *, rounds, least_seconds, methods=METHODS, starting=lambda text: None
):
    """Every layer, mode and precision on `device`, in every form; a CudaDevice or what stands in for one."""
    environment = describe("PyTorch's caching allocator", "the GPU's, L2 emptied before each repeat")
    environment |= device.describe()
    before = device.copy_bandwidth()
    measurements = []
    for name in precisions:
        with precision(name):
            for mode in modes:
                for layer in layers:
                    starting(f"{layer.name}, {mode}, {name}")
                    problem = Problem(layer, mode, DTYPES[PRECISIONS[name]])
                    measurements.append(_measure(device, problem, name, methods, rounds, least_seconds))
                    device.release()
    return GpuResult(environment, (before, device.copy_bandwidth()), measurements)


def _measure(device, problem, name, methods, rounds, least_seconds):
    torch.compiler.reset()
    arena = Arena(problem, device=device.torch_device)
    calls, wrong, refused = {}, {}, {}
    for form in [Form(method, layout) for method in methods for layout in LAYOUTS]:
        try:
            call = arena.call(form)
            arena.check({form: call})
            calls[form] = call
            if form.method in REPLAYED:
                replayed = Form(form.method + GRAPH, form.layout)
                call = device.graph(call)
                arena.check({replayed: call})
                calls[replayed] = call
        except WrongResult as error:
            wrong[str(form)] = str(error)
        except device.out_of_memory() as error:
            refused[str(form)] = f"out of memory: {str(error).splitlines()[0]}"
        except Exception as error:  # one form's failure: told, and the others go on
            refused[str(form)] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    samples = measure(calls, rounds=rounds, least_seconds=least_seconds, clock=device) if calls else {}
    peak_bytes = {form: device.peak_bytes(call) for form, call in calls.items() if not form.method.endswith(GRAPH)}
    return GpuMeasurement(problem, name, samples, peak_bytes, _predicted(device, problem), wrong, refused)


def _predicted(device, problem):
    """Seconds that the planner predicts for the fused op, channels_last, without the passes that BatchNorm adds."""
    stages = (False, True) if problem.trains else (False,)
    return sum(problem.plan(device.planned_as(), backward=backward).seconds for backward in stages)


def to_json(result):
    return json.dumps(
        {
            "environment": result.environment,
            "copy_bandwidth": result.copy_bandwidth,
            "measurements": [_measurement_dict(result, measurement) for measurement in result.measurements],
        },
        indent=1,
    )


def _measurement_dict(result, m):
    return {
        "layer": asdict(m.problem.layer),
        "mode": m.problem.mode,
        "precision": m.precision,
        "flops": m.problem.flops,
        "least_bytes": m.problem.least_bytes,
        "predicted_seconds": m.predicted,
        "wrong": m.wrong,
        "refused": m.refused,
        "forms": [
            {
                "method": form.method,
                "layout": form.layout,
                "gain": m.gain(form) if form.method.startswith(FUSED) else None,
                "bytes_per_second": m.bytes_per_second(form),
                "share_of_copy": m.bytes_per_second(form) / result.bandwidth,
                "peak_bytes": m.peak_bytes.get(form),
                **asdict(sample),
            }
            for form, sample in m.samples.items()
        ],
    }


def file_stem(name):
    """The name of a GPU as part of a file name: `NVIDIA H100 80GB HBM3` -> `nvidia-h100-80gb-hbm3`."""
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def main(arguments, device=None):
    """Measures as the arguments of bench/__main__.py say, writes the page and the JSON; returns the exit status."""
    from .gpu_report import page

    device = device or CudaDevice()
    result = run_gpu_suite(
        device,
        arguments.layers,
        arguments.mode,
        arguments.precision,
        rounds=arguments.rounds,
        least_seconds=arguments.least_ms / 1e3,
        methods=arguments.methods,
        starting=lambda text: print(text, flush=True),
    )
    text = page(result)
    print(f"\n{text}")
    target = arguments.json or RESULTS / f"{file_stem(device.name)}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(to_json(result))
    target.with_suffix(".md").write_text(text + "\n")
    print(f"\nEvery figure: {target}; this page: {target.with_suffix('.md')}")
    return 1 if result.wrong else 0
