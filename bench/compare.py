"""Two checkouts, each built in place, against each other: the time of every operator on every layer, as a ratio.

    git worktree add ../before HEAD~1 && (cd ../before && make build)
    python -m bench.compare ../before . --layers quick --batch 16 --ops fwd bwd

Processes of the two checkouts take turns round by round, so that a change of the machine's load meets both. Of a
call's rounds in a process the least time counts, since what disturbs a call makes it slower; of the processes of a
checkout the median: in each of them the tensors lie in other pages, which meet in other sets of a cache, and that alone
makes a call up to 20 % faster or slower. The tool itself is that of this checkout: the others only give dsconv_cuda.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import torch
from tabulate import tabulate

from dsconv_cuda.activations import ACTIVATIONS
from dsconv_cuda.ops import GRAD_BITS, GRAD_DW_WEIGHT, GRAD_PW_WEIGHT, GRAD_X, IDENTITY

from .environment import keep_freed_memory
from .layers import select
from .plain import LAYOUTS, LAYOUTS_3D
from .problem import DTYPES
from .timing import WallClock, measure

OPS = ("fwd", "bwd", "z_moments", "fwd_norm", "bwd_norm", "norm_act", "norm_act_sums")
RELU6 = ACTIVATIONS["relu6"].number
ALL_GRADIENTS, THOSE_OF_X_AND_WEIGHTS = sum(GRAD_BITS), GRAD_X | GRAD_DW_WEIGHT | GRAD_PW_WEIGHT
# Starts in a checkout, whose dsconv_cuda it imports, and goes on with this one's bench.
WORKER = """
import os, sys
try:
    from dsconv_cuda import _loader
except ModuleNotFoundError as error:
    sys.exit(f"{os.getcwd()} is no checkout of this project: {error}")
library = _loader.load_library().path
sys.path.insert(0, sys.argv[1])
from bench import compare
compare.answer(library)
"""


def calls(layer, dtype, layout):
    """{operator: a call of it}"""
    ops, generator = torch.ops.dsconv_cuda, torch.Generator().manual_seed(0)
    middle, wide = layer.middle_channels, layer.out_channels

    def values(*shape, scale=1.0):
        return (torch.randn(shape, generator=generator) * scale).to(dtype)

    dims = len(layer.size)
    formats = LAYOUTS_3D if dims == 3 else LAYOUTS

    def map_of(*shape):
        return values(*shape).contiguous(memory_format=formats[layout])

    def vectors(channels):
        return torch.stack([torch.full((channels,), value, dtype=torch.float64) for value in (0.1, 0.9, 1.1, 0.2)])

    x = map_of(layer.batch, layer.channels, *layer.size)
    y, dy = (map_of(layer.batch, wide, *layer.out_size) for _ in range(2))
    dw_weight = values(middle, 1, *layer.kernel, scale=(2 / layer.taps) ** 0.5)
    pw_weight = values(wide, middle, *[1] * dims, scale=(2 / middle) ** 0.5)
    dw_bias, pw_bias = values(middle), values(wide)
    padding = list(layer.padding) * 2
    geometry = [layer.stride] * dims, padding, [layer.dilation] * dims
    in_the_middle, behind, count = vectors(middle), vectors(wide), float(layer.batch * layer.out_pixels)
    sums = ops.norm_act_sums(dy, y, behind, RELU6)
    weights = dw_weight, pw_weight
    return {
        "fwd": lambda: ops.fwd(x, *weights, dw_bias, pw_bias, *geometry, RELU6, IDENTITY),
        "bwd": lambda: ops.bwd(dy, x, *weights, dw_bias, None, *geometry, RELU6, IDENTITY, ALL_GRADIENTS),
        "z_moments": lambda: ops.z_moments(x, *weights, None, *geometry),
        "fwd_norm": lambda: ops.fwd_norm(x, *weights, None, None, in_the_middle, *geometry, RELU6, True),
        "bwd_norm": lambda: ops.bwd_norm(
            *(dy, y, x, *weights, None, in_the_middle, behind, sums, count),
            *(*geometry, RELU6, RELU6, THOSE_OF_X_AND_WEIGHTS),
        ),
        "norm_act": lambda: ops.norm_act(y, behind, RELU6),
        "norm_act_sums": lambda: ops.norm_act_sums(dy, y, behind, RELU6),
    }


def answer(library):
    """The worker: for each question on stdin the seconds of its calls, {operator: seconds}."""
    if not Path(library).is_relative_to(Path.cwd()):
        sys.exit(f"{Path.cwd()} has no library of its own, {library} would be measured: make build there")
    keep_freed_memory()
    timed = {}
    for line in sys.stdin:
        question = json.loads(line)
        if "layer" in question:
            torch.set_num_threads(question["threads"])
            (layer,) = select(question["layer"])
            layer = dataclasses.replace(layer, batch=question["batch"] or layer.batch)
            made = calls(layer, DTYPES[question["dtype"]], question["layout"])
            timed = {name: made[name] for name in question["ops"]}
        samples = measure(timed, rounds=1, least_seconds=question["least_seconds"], clock=WallClock())
        print(json.dumps({name: sample.median for name, sample in samples.items()}), flush=True)


class Worker:
    """A process with the dsconv_cuda of one checkout."""

    def __init__(self, tree):
        here = Path(__file__).resolve().parent.parent
        command = [sys.executable, "-c", WORKER, str(here)]
        self.process = subprocess.Popen(
            command, cwd=tree, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def ask(self, **question):
        with contextlib.suppress(BrokenPipeError):  # that it has ended is told below
            print(json.dumps(question), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of a checkout ended with {self.process.wait()}")
        return json.loads(line)

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def compare(workers, layer, arguments):
    """{operator: the seconds in each checkout}; workers: of each checkout."""
    least = {name: [[math.inf] * len(of_tree) for of_tree in workers] for name in arguments.ops}
    about = {name: getattr(arguments, name) for name in ("threads", "batch", "dtype", "layout", "ops")}
    for round_number in range(arguments.rounds):
        question = {"layer": layer.name, **about} if round_number == 0 else {}
        for process in range(arguments.processes):
            for tree, of_tree in enumerate(workers):
                answer = of_tree[process].ask(least_seconds=arguments.least_ms / 1e3, **question)
                for name, seconds in answer.items():
                    least[name][tree][process] = min(least[name][tree][process], seconds)
    return {name: [statistics.median(of_tree) for of_tree in seconds] for name, seconds in least.items()}


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m bench.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("trees", nargs=2, metavar="CHECKOUT", help="the one before, the one after")
    parser.add_argument("--layers", default="quick", help="as of python -m bench")
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--batch", type=int, help="instead of the layers' own")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--layout", choices=LAYOUTS, default="channels_last")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--processes", type=int, default=5, help="of each checkout")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--least-ms", type=float, default=5, help="of one measurement")
    arguments = parser.parse_args(argv)
    try:
        arguments.layers = select(arguments.layers)
    except ValueError as error:
        parser.error(str(error))
    return arguments


def main(argv=None):
    arguments = parse_arguments(argv)
    workers = [[Worker(tree) for _ in range(arguments.processes)] for tree in arguments.trees]
    ratios, rows = defaultdict(list), []
    for layer in arguments.layers:
        seconds = compare(workers, layer, arguments)
        for name, (before, after) in seconds.items():
            ratios[name].append(after / before)
        figures = [f"{1e6 * b:.0f} -> {1e6 * a:.0f}  {a / b:.2f}" for b, a in seconds.values()]
        rows.append([layer.name, *figures])
        print(layer.name, *figures, sep="  ", file=sys.stderr)
    for worker in itertools.chain(*workers):
        worker.close()
    means = [f"{statistics.geometric_mean(ratios[name]):.3f}" for name in arguments.ops]
    print(f"microseconds before -> after, and the ratio; {' '.join(map(str, arguments.trees))}\n")
    titles = ["layer", *arguments.ops]
    rows.append(["geometric mean", *means])
    print(tabulate(rows, titles, tablefmt="github", colalign=["left", *["right"] * len(arguments.ops)]))


if __name__ == "__main__":
    main()
