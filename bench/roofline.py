"""What the fused CUDA forward should take on a GPU, by what was counted without one: a page of predicted times.

    python -m bench.roofline > bench/results/roofline.md      # some minutes; needs nvcc, cuobjdump and g++

Instructions of the inner loops are read from the machine code (bench/sass.py), traffic is counted in the emulation
(bench/traffic.py), and each resource of the GPU has a rate (dsconv_cuda.gpus()). A kernel takes at least as long as the
resource that it keeps busy longest.
"""

import argparse
import functools
import math
import sys
from dataclasses import dataclass, replace

import torch
from tabulate import tabulate

import dsconv_cuda

from . import traffic
from .layers import select
from .problem import DTYPES, FORWARD, Problem, inner_taps
from .sass import CompiledKernel, compile_kernels, sources

GPUS = ("sm_90", "sm_89")
BLOCKS = 4
LAUNCH = 2e-6  # csrc/cuda/cuda_cost.h
LANES = {75: 64, 80: 64}  # fp32 lanes of a multiprocessor; elsewhere 128
SCHEDULERS = 4  # of a multiprocessor, one instruction of a warp a clock each
WAVEFRONT = 128  # bytes a clock that L1 and shared memory, one unit, give a multiprocessor

ASSUMPTIONS = """\
Assumptions, each of which a measurement may overturn:

1. Clocks, bandwidths and rates are those of the data sheets at boost, as in `dsconv_cuda.gpus()`; the bandwidth of L2
   and the 62 % that mma.sync reaches on sm_90 are from published micro-benchmarks.
2. Everything overlaps: a kernel takes as long as its busiest resource, and a launch 2 us beside it. Latency that too
   few warps hide is not counted, nor is the last, partly filled wave.
3. DRAM: x, y and the weights cross once; what blocks share they find in L2. L2: each block asks for a sector once, as
   if L1 and shared memory kept all that a block needs. L1 and shared memory: 128 bytes a clock together, by counted
   sectors and wavefronts.
4. Instructions: 4 a clock and multiprocessor, those of the two inner loops alone: the product's and the depthwise
   taps'. Tensor cores: the products at the rate of mma.sync.
5. Of every layer the fused kernel, also where the planner splits the forward around a library's product.
6. Unfused and fused floors are at the ceilings: every tensor once through DRAM, products on the tensor cores, taps by
   fp32 multiply-adds, nothing else; 2 us a launch. No library is faster than the unfused floor without fusing."""

LEGEND = """\
over fused floor: how far the kernel is from the best that any fused kernel could do. gain over unfused: how much faster
it is predicted to be than two library kernels at the ceilings; below 1, slower."""


@dataclass(frozen=True)
class Loops:
    """Instructions of a warp for one multiply-add of its 32 lanes, in the two inner loops."""

    product: dict[str, int]
    taps: dict[str, int] | None

    @staticmethod
    def per_multiply_add(loop):
        return loop["all"] / warp_multiply_adds(loop)


@dataclass(frozen=True)
class Prediction:
    name: str
    seconds: dict[str, float]  # of the kernel, by resource
    unfused: float
    fused: float  # both floors

    @property
    def total(self):
        return LAUNCH + max(self.seconds.values())

    @property
    def bound(self):
        return max(self.seconds, key=self.seconds.get)


def warp_multiply_adds(loop):
    """By all lanes of a warp in one turn of a loop."""
    scalar = loop["FFMA"] + 2 * loop["HFMA2"] + loop["DFMA"]
    return 32 * scalar + 2048 * loop["HMMA.16816"] + 1024 * loop["HMMA.1688"]


def inner_loops(kernel: CompiledKernel) -> Loops:
    """The loop of the product, which has most multiply-adds, or its stretch on tensor cores, and that of the taps,
    which has most of what is left."""
    loops = sorted((loop for loop in kernel.loops if warp_multiply_adds(loop)), key=warp_multiply_adds)
    if kernel.tensor_stretch and kernel.tensor_stretch["HMMA"]:
        loops = [*(loop for loop in loops if not loop["HMMA"]), kernel.tensor_stretch]
    if not loops:
        raise ValueError(f"{kernel.name}: no loop with multiply-adds")
    return Loops(loops[-1], loops[-2] if len(loops) > 1 else None)


@functools.cache
def forward_kernels(architecture, dtype) -> dict[str, CompiledKernel]:
    found = {}
    for source in sources():
        if "forward" in source and source.endswith(f"_{traffic.SHORT[dtype]}.cu"):
            found |= {kernel.symbol: kernel for kernel in compile_kernels(source, (architecture,))}
    return found


def clock(gpu):
    return gpu.fma_f32 / (gpu.multiprocessors * LANES.get(gpu.capability, 128))


def multiply_adds(problem):
    """Of the taps inside the image and of the product."""
    layer = problem.layer
    inside = math.prod(
        inner_taps(size, size_out, kernel, layer.stride, layer.dilation, padding)
        for size, size_out, kernel, padding in zip(
            (layer.height, layer.width), layer.out_size, layer.kernel, layer.padding, strict=True
        )
    )
    channels = layer.batch * layer.middle_channels
    return channels * inside, channels * layer.out_channels * math.prod(layer.out_size)


def predict(counted, gpu, kernel: CompiledKernel) -> Prediction:
    problem = counted.problem
    (launch,) = counted.launches
    loops = inner_loops(kernel)
    taps, product = multiply_adds(problem)
    plan = traffic.plan_of(problem, counted.layout, gpu)
    planned = traffic.fused_of(plan)
    # Blocks of other output channels compute z again, and so do tiles beyond the image.
    pixels = problem.layer.batch * math.prod(problem.layer.out_size)
    repeated = max(1.0, launch.blocks * planned.tile[0] / pixels)
    instructions = product * Loops.per_multiply_add(loops.product)
    if loops.taps is not None:
        instructions += repeated * taps * Loops.per_multiply_add(loops.taps)
    turns = clock(gpu) * gpu.multiprocessors
    half = gpu.mma_f16 if problem.dtype != torch.float32 else gpu.mma_tf32
    seconds = {
        "DRAM": problem.least_bytes / gpu.bandwidth,
        "L2": launch.bytes(kind="of_blocks") / gpu.l2_bandwidth,
        "L1, shared": (launch.bytes() / WAVEFRONT + launch.wavefronts) / turns,
        "instructions": instructions / (SCHEDULERS * turns),
        "tensor cores": product / half if kernel.instructions["HMMA"] else 0.0,
    }
    unfused = next(alternative for alternative in plan.alternatives if not alternative.ours)
    fused = LAUNCH + max(problem.least_bytes / gpu.bandwidth, product / half, taps / gpu.fma_f32)
    return Prediction(problem.layer.name, seconds, unfused.seconds, fused)


# ------------------------------------------------------------------------------------------------------------- the page


def loops_table(kernels: list[CompiledKernel]) -> str:
    rows = []
    for kernel in sorted(set_of(kernels), key=lambda kernel: kernel.name):
        loops = inner_loops(kernel)
        row = [kernel.name, kernel.architecture]
        for loop in (loops.product, loops.taps):
            if loop is None:
                row += [""] * 5
                continue
            row += [loop["all"], loop["HMMA"] or loop["FFMA"] + loop["HFMA2"], loop["LDS"] + loop["LDSM"], loop["LDG"]]
            row.append(f"{Loops.per_multiply_add(loop) * 32:.2f}")
        rows.append(row)
    titles = ["kernel", "on", "product: instructions", "HMMA or FMA", "LDS, LDSM", "LDG", "each FMA of a lane"]
    titles += ["taps: instructions", "FMA", "LDS", "LDG", "each FMA of a lane"]
    return tabulate(rows, titles, tablefmt="github", disable_numparse=True)


def set_of(kernels):
    return {(kernel.symbol, kernel.architecture): kernel for kernel in kernels}.values()


def times_table(predictions: list[Prediction]) -> str:
    resources = list(predictions[0].seconds)
    rows = []
    for p in predictions:
        row = [p.name, *(f"{p.seconds[resource] * 1e6:.1f}" for resource in resources)]
        row += [f"{p.total * 1e6:.1f}", p.bound, f"{p.fused * 1e6:.1f}", f"{p.unfused * 1e6:.1f}"]
        row += [f"{p.total / p.fused:.2f}", f"{p.unfused / p.total:.2f}"]
        rows.append(row)
    titles = [
        "layer",
        *resources,
        "predicted",
        "by",
        "fused floor",
        "unfused floor",
        "over fused floor",
        "gain over unfused",
    ]
    alignment = ["left", *["right"] * (len(resources) + 1), "left", *["right"] * 4]
    return tabulate(rows, titles, tablefmt="github", disable_numparse=True, colalign=alignment)


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m bench.roofline", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", default=traffic.FAMILIES, help="quick, all, or names separated by commas")
    parser.add_argument("--arch", nargs="+", choices=dsconv_cuda.gpus(), default=list(GPUS))
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="float16")
    parser.add_argument("--layout", choices=traffic.LAYOUTS, default="channels_last")
    parser.add_argument("--batch", type=int, default=traffic.BATCH)
    parser.add_argument("--blocks", type=int, default=BLOCKS, help="counted of a launch")
    return parser.parse_args(argv)


def main(argv=None):
    arguments = parse_arguments(argv)
    layers = [replace(layer, batch=arguments.batch) for layer in select(arguments.layers)]
    problems = [Problem(layer, FORWARD, DTYPES[arguments.dtype]) for layer in layers]
    title = f"{arguments.dtype}, {arguments.layout}, {arguments.batch} images"
    print(f"# The CUDA forward on the roofline: {title}\n\n{ASSUMPTIONS}")
    used, pages = [], []
    for architecture in arguments.arch:
        gpu = dsconv_cuda.gpus()[architecture]
        compiled = forward_kernels(architecture, arguments.dtype)
        counted = traffic.count(problems, arguments.layout, gpu, arguments.blocks, fused=True)
        kernels = [compiled[c.launches[0].name] for c in counted]
        used += kernels
        predictions = [predict(c, gpu, kernel) for c, kernel in zip(counted, kernels, strict=True)]
        pages.append(f"## {gpu}, microseconds a layer\n\n{times_table(predictions)}")
    print(f"\n## Instructions of the inner loops\n\n{loops_table(used)}")
    print("\n" + "\n\n".join(pages))
    print(f"\n{LEGEND}")


if __name__ == "__main__":
    sys.exit(main())
