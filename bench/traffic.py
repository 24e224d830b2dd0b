"""The memory traffic of the CUDA kernels, counted in the emulation: no GPU is needed, g++ is.

    python -m bench.traffic                                   # the layer families, forward and training, both layouts
    python -m bench.traffic --layers convnext_k7 --kernels    # one layer, with a line for each kernel and tensor
    python -m bench.traffic --dtype float32 --batch 1 --arch sm_80

tests/cuda_host compiles the kernels' own source for the host, with a call at every access of memory, and puts the
accesses of a warp's lanes together to instructions (tests/cuda_host/counters.h). Of each launch some blocks, drawn
evenly, are counted and scaled to the grid. A figure is what instructions ask for, in 32-byte sectors, before any cache;
"a block" counts a sector once a block: what L2 is asked for where L1 keeps all that a block needs.

    least      x once, the weights once a wave of blocks, y once; training: what bench/problem.py counts for it
    x and y    of the activations alone: sectors of x and y over their bytes
    weights    sectors of the weights over one read of them by every block
    in L2      over least with the weights once a wave in both: what is left where L2 holds them for a wave's blocks
    unfused    least bytes of the unfused sequence: x, the intermediate twice, the weights, y
    split      the forward is a depthwise kernel, the library's product and perhaps a pass over y. Of the product
               nothing is counted; it is assumed to ask for what tiles of 128 x 128 do, each operand once a tile of the
               other. act(z), between the two, is among "x and y"
    wavefronts of shared memory, over as many without bank conflicts
"""

import argparse
import functools
import importlib.util
import json
import math
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tabulate import tabulate

import dsconv_cuda
from dsconv_cuda import planning
from dsconv_cuda.activations import activation_number

from .layers import GPU_LAYERS, LAYERS, Layer, select
from .problem import DTYPES, FORWARD, TRAINING, TRAINING_BN, Problem
from .sass import demangle

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / ".cache" / "cuda_host"
LAYOUTS = {"channels_last": "nhwc", "nchw": "nchw"}
SHORT = {"float32": "f32", "float64": "f64", "float16": "f16", "bfloat16": "bf16"}
TF32 = "tf32"
PRODUCT = "library_product"  # a launch that is assumed and not counted
SECTOR = 32
COUNTED_MODES = (FORWARD, TRAINING)
FAMILIES = (
    "mbv1_b01,mbv1_b02,mbv1_b05,mbv1_b07,mbv1_b13,mbv2_96x112s2_24,mbv2_144x56s1_24,mbv2_576x14s1_96,mbv2_960x7s1_160,"
    "effb0_k5_144x56s2_40,effb0_k5_672x14s1_112,effb0_k5_1152x7s1_192,mbv3_k5_72x56s2_40,xception_mid,convnext_k7,"
    "replknet_k31,conformer_k31,dilated_d2"
)
BATCH = 32
BLOCKS = 12
MANY_TAPS = 50  # from which fewer blocks are counted: they take as much longer
GOALS = {3: 1.25, 5: 1.5, 7: 1.5}  # of the forward, by the kernel's extent
TRAINING_GOAL, WAVEFRONT_GOAL = 1.5, 1.1

MIDDLE = "relu6"  # training too: backward then needs z
ACTIVATIONS = ("x", "y", "pre", "act_z")
WEIGHTS = ("dw_weight", "dw_bias", "pw_weight", "pw_bias")


@dataclass(frozen=True)
class Traffic:
    """Of one tensor in one launch, in bytes, scaled to the whole grid."""

    read: float
    written: float
    of_blocks: float  # each sector once a block


@dataclass(frozen=True)
class Launch:
    phase: str
    name: str
    blocks: int
    tensors: dict[str, Traffic]
    wavefronts: float
    free_wavefronts: float

    def bytes(self, names=None, kind="requested"):
        wanted = [t for name, t in self.tensors.items() if names is None or name in names]
        return sum(t.of_blocks if kind == "of_blocks" else t.read + t.written for t in wanted)


@dataclass(frozen=True)
class Counted:
    """What the launches of one problem ask for."""

    problem: Problem
    layout: str
    waves: int  # of the forward kernel, rounded up; 1 where it is split
    launches: tuple[Launch, ...]

    @property
    def _item(self):
        return self.problem.dtype.itemsize

    @property
    def _sizes(self):
        """Bytes of x, z, y, the weights with their biases."""
        layer = self.problem.layer
        pixels = layer.batch * math.prod(layer.out_size)
        return tuple(
            size * self._item
            for size in (
                layer.batch * layer.channels * layer.height * layer.width,
                pixels * layer.middle_channels,
                pixels * layer.out_channels,
                layer.middle_channels * (math.prod(layer.kernel) + layer.out_channels + 1) + layer.out_channels,
            )
        )

    @property
    def least(self):
        if self.problem.mode == TRAINING:
            return self.problem.least_bytes
        x, _, y, weights = self._sizes
        return x + y + self.waves * weights

    @property
    def unfused(self):
        x, z, y, weights = self._sizes
        forward = x + 2 * z + y + weights
        # Backward of the pair: dy and z, du written and read twice, x; gradients written.
        return forward if self.problem.mode == FORWARD else forward + (y + z + 3 * z + x) + (x + 2 * weights)

    @property
    def over_least(self):
        return sum(launch.bytes() for launch in self.launches) / self.least

    @property
    def over_least_of_blocks(self):
        return sum(launch.bytes(kind="of_blocks") for launch in self.launches) / self.least

    @property
    def over_unfused(self):
        return sum(launch.bytes() for launch in self.launches) / self.unfused

    @property
    def activations(self):
        x, _, y, _ = self._sizes
        return sum(launch.bytes(ACTIVATIONS) for launch in self.launches) / (x + y)

    @property
    def weights(self):
        """Of the forward."""
        *_, weights = self._sizes
        blocks = sum(launch.blocks for launch in self.launches)
        return sum(launch.bytes(WEIGHTS) for launch in self.launches) / (weights * blocks)

    @property
    def over_least_in_l2(self):
        """Of the forward."""
        *_, weights = self._sizes
        return (sum(launch.bytes(ACTIVATIONS) for launch in self.launches) + self.waves * weights) / self.least

    @property
    def wavefronts(self):
        free = sum(launch.free_wavefronts for launch in self.launches)
        return sum(launch.wavefronts for launch in self.launches) / free if free else 1.0

    @property
    def is_split(self):
        return any(launch.name == PRODUCT for launch in self.launches)

    @property
    def goal(self):
        if self.problem.mode == TRAINING:
            return TRAINING_GOAL
        return GOALS.get(max(self.problem.layer.kernel))


@functools.cache
def builder():
    path = ROOT / "tests" / "cuda_host" / "build.py"
    spec = importlib.util.spec_from_file_location("cuda_host_build", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class LaunchSizes:
    """With what a kernel is started on an architecture: the launches of all layers and of the tests' own calls."""

    threads: int
    # (bytes of dynamic shared memory, blocks that the planner plans to share a multiprocessor or 0 where it plans none)
    launches: frozenset[tuple[int, int]] = frozenset()

    @property
    def least_shared(self):
        return min((shared for shared, _ in self.launches), default=0)

    @property
    def most_shared(self):
        return max((shared for shared, _ in self.launches), default=0)


def launches(gpus=None) -> dict[tuple[str, str], LaunchSizes]:
    """{(architecture, symbol): sizes} of every kernel that the launchers start, on these GPUs or those of the table."""
    gpus = list(dsconv_cuda.gpus().values()) if gpus is None else gpus
    lines = [
        _request("-", Problem(layer, TRAINING, dtype), layout, gpu, 0, precision)
        for layer in (*LAYERS, *GPU_LAYERS)
        for precision, dtype in (*DTYPES.items(), (TF32, torch.float32))
        for layout in LAYOUTS
        for gpu in gpus
    ]
    done = _run("launches", lines)
    found = {}
    for line in done.splitlines():
        launch = json.loads(line)
        key = f"sm_{launch['capability']}", launch["symbol"]
        before = found.get(key, LaunchSizes(0))
        found[key] = LaunchSizes(
            max(before.threads, launch["threads"]),
            before.launches | {(launch["dynamic_shared"], launch["planned"])},
        )
    return found


def _run(command, lines):
    program = builder().build_traffic(BUILD)
    done = subprocess.run([program, command], input="\n".join(lines), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{program} {command} failed\n{done.stdout[-2000:]}{done.stderr}")
    return done.stdout


def count(
    problems: list[Problem], layout: str, gpu: dsconv_cuda.Gpu, blocks=BLOCKS, precision="", fused=False
) -> list[Counted]:
    """precision: TF32 where float32 products may be rounded to it. fused: the fused forward, whatever is planned."""
    found = defaultdict(list)
    lines = [
        _request(str(index), problem, layout, gpu, blocks, precision, "fused" if fused else problem.mode)
        for index, problem in enumerate(problems)
    ]
    for line in _run("count", lines).splitlines():
        launch = json.loads(line)
        found[int(launch["call"])].append(_launch(launch))
    waves = [_waves(problem, layout, gpu, fused) for problem in problems]
    return [Counted(problem, layout, waves[i], tuple(found[i])) for i, problem in enumerate(problems)]


def _waves(problem, layout, gpu, fused):
    plan = plan_of(problem, layout, gpu)
    if len(plan.kernels) > 1 and not fused and problem.mode != TRAINING_BN:
        return 1
    return math.ceil(fused_of(plan).waves)


def fused_of(plan: planning.CudaPlan) -> planning.Kernel:
    """The best of the fused forward's kernels."""
    kernels = [a.kernels[0] for a in plan.alternatives if a.ours and len(a.kernels) == 1]
    return min(kernels, key=lambda kernel: (kernel.seconds, kernel.arithmetic_seconds))


def _request(name, problem, layout, gpu, blocks, precision, mode=None):
    layer = problem.layer
    dtype = TF32 if precision == TF32 else SHORT[str(problem.dtype).removeprefix("torch.")]
    fields = (
        name,
        dtype,
        LAYOUTS[layout],
        mode or problem.mode,
        layer.batch,
        layer.channels,
        layer.height,
        layer.width,
    )
    fields += (*layer.kernel, layer.stride, layer.dilation, layer.out_channels, layer.multiplier)
    fields += (activation_number(MIDDLE), activation_number(problem.out_activation))
    blocks = max(2, min(blocks, blocks * MANY_TAPS // math.prod(layer.kernel)))
    return " ".join(map(str, (*fields, gpu.capability, gpu.multiprocessors, blocks)))


def _launch(found):
    scale = found["blocks"] / found["counted_blocks"]
    return Launch(
        found["phase"],
        found["symbol"],
        found["blocks"],
        {
            name: Traffic(*(scale * SECTOR * sectors for sectors in (read, written, of_blocks)))
            for name, (read, written, of_blocks, _) in found["tensors"].items()
        },
        scale * (found["load_wavefronts"] + found["store_wavefronts"]),
        scale * (found["free_load_wavefronts"] + found["free_store_wavefronts"]),
    )


def plan_of(problem, layout, gpu) -> planning.CudaPlan:
    """The plan of the problem's forward."""
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    return problem.plan(gpu, memory_format=memory_format, activation=MIDDLE)


# ------------------------------------------------------------------------------------------------------------- report


def table(counted: list[Counted]) -> str:
    mode = counted[0].problem.mode
    titles = ["layer", "layout", "split", "over least", "goal", "", "a block", "over unfused", "wavefronts"]
    if mode == FORWARD:
        titles += ["x and y", "weights", "waves", "in L2", ""]
    rows = []
    for c in counted:
        met = "" if c.goal is None else "met" if c.over_least <= c.goal else "missed"
        row = [
            c.problem.layer.name,
            c.layout,
            "split" if c.is_split else "",
            f"{c.over_least:.2f}",
            f"{c.goal:.2f}" if c.goal else "",
            met,
        ]
        row += [f"{c.over_least_of_blocks:.2f}", f"{c.over_unfused:.2f}", f"{c.wavefronts:.2f}"]
        if mode == FORWARD:
            met = "" if c.goal is None else "met" if c.over_least_in_l2 <= c.goal else "missed"
            row += [f"{c.activations:.2f}", f"{c.weights:.2f}", str(c.waves), f"{c.over_least_in_l2:.2f}", met]
        rows.append(row)
    alignment = ["left"] * 3 + [*["right"] * 2, "left", *["right"] * (len(titles) - 6)]
    return tabulate(rows, titles, tablefmt="github", disable_numparse=True, colalign=alignment)


def kernel_table(counted: Counted) -> str:
    names = dict(zip([k.name for k in counted.launches], demangle([k.name for k in counted.launches]), strict=True))
    rows = []
    for launch in counted.launches:
        for index, (tensor, t) in enumerate(launch.tensors.items()):
            free = launch.free_wavefronts
            left = (names[launch.name], launch.blocks, f"{launch.wavefronts / free:.2f}" if free else "")
            rows.append(
                [
                    *(left if index == 0 else ("", "", "")),
                    tensor,
                    *(f"{v / 1e6:.3f}" for v in (t.read, t.written, t.of_blocks)),
                ]
            )
    titles = ["kernel", "blocks", "wavefronts", "tensor", "MB read", "MB written", "MB, once a block"]
    return tabulate(rows, titles, tablefmt="github", disable_numparse=True)


def summary(counted: list[Counted]) -> str:
    lines = []
    for mode in dict.fromkeys(c.problem.mode for c in counted):
        group = [c for c in counted if c.problem.mode == mode]
        goals = [c for c in group if c.goal is not None]
        strict = sum(c.over_least <= c.goal for c in goals)
        in_l2 = ""
        if mode == FORWARD:
            met = sum(c.over_least_in_l2 <= c.goal for c in goals)
            in_l2 = f", with the weights once a wave in {met}"
        still = sum(c.wavefronts <= WAVEFRONT_GOAL for c in group)
        lines.append(
            f"{mode}: sectors over least within the goal in {strict} of {len(goals)}{in_l2}; "
            f"wavefronts within {WAVEFRONT_GOAL} in {still} of {len(group)}"
        )
    return "\n".join(lines)


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m bench.traffic", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--mode", nargs="+", choices=COUNTED_MODES, default=COUNTED_MODES)
    return parser.parse_args(argv)


def add_arguments(parser):
    parser.add_argument("--layers", default=FAMILIES, help="quick, all, or names separated by commas")
    parser.add_argument("--dtype", choices=DTYPES, default="float16")
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--batch", type=int, default=BATCH, help=f"images of every layer (default {BATCH})")
    parser.add_argument("--blocks", type=int, default=BLOCKS, help=f"counted of a launch (default {BLOCKS})")
    parser.add_argument("--arch", default="sm_90", choices=dsconv_cuda.gpus(), help="that the planner plans for")
    parser.add_argument("--kernels", action="store_true", help="a table of every kernel and tensor too")


def main(argv=None):
    arguments = parse_arguments(argv)
    gpu = dsconv_cuda.gpus()[arguments.arch]
    layers: list[Layer] = [replace(layer, batch=arguments.batch) for layer in select(arguments.layers)]
    print(
        f"Memory traffic of the CUDA kernels, counted in the emulation: {arguments.dtype}, {arguments.batch} images, "
        f"planned for {gpu}, {arguments.blocks} blocks of each launch"
    )
    everything = []
    for mode in arguments.mode:
        problems = [Problem(layer, mode, DTYPES[arguments.dtype]) for layer in layers]
        by_layout = [count(problems, layout, gpu, arguments.blocks) for layout in arguments.layout]
        counted = [c for together in zip(*by_layout, strict=True) for c in together]
        everything += counted
        print(f"\n{mode}\n\n{table(counted)}")
        if arguments.kernels:
            for c in counted:
                print(f"\n{c.problem.layer.name}, {mode}, {c.layout}\n\n{kernel_table(c)}")
    print(f"\n{summary(everything)}")
    print("\nover least: sectors asked for by instructions over the least bytes; a block: each sector once a block.")


if __name__ == "__main__":
    sys.exit(main())
