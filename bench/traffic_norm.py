"""The memory traffic of training through BatchNorm on CUDA, counted in the emulation as in bench.traffic.

    python -m bench.traffic_norm                                  # the layer families, both layouts
    python -m bench.traffic_norm --layers mbv1_b02 --kernels      # one layer, with a line for each kernel and tensor

The unit is a pass: the bytes of z, the intermediate. With r = C_out / C at stride 1 the forward needs 2 + r of them: x
for the statistics of z, x for y, y with its statistics; with a stride x has more than one pass (`least` says what is
needed). Unfused it is 6 + r: z written, read for its statistics, read and written by the norm, read by the pointwise
part, x, y (the norm's activation in place).

    statistics, forward   passes asked for, everything counted: activations, weights, partial sums
    in L2      activations and partial sums, and the weights once a wave of blocks: what is left where L2 holds them
    goal       1.3 times least, for the two together
    norm       the second norm and its activation, of 2 r; a chain does without
    backward   all of it, over least: x, y and the gradient of the output read, that of x written
"""

import argparse
import math
import sys
from collections import defaultdict
from dataclasses import dataclass, replace

from tabulate import tabulate

import dsconv_cuda

from . import traffic
from .layers import select
from .problem import DTYPES, TRAINING_BN, Problem

SLACK = 1.3
STATISTICS, FORWARD, NORM, BACKWARD = "statistics", "forward", "norm", "backward"


@dataclass(frozen=True)
class Step:
    counted: traffic.Counted

    @property
    def _sizes(self):
        """Bytes of x, z, y."""
        layer, item = self.counted.problem.layer, self.counted.problem.dtype.itemsize
        pixels = layer.batch * math.prod(layer.out_size)
        x = layer.batch * layer.channels * layer.pixels
        return x * item, pixels * layer.middle_channels * item, pixels * layer.out_channels * item

    @property
    def least(self):
        """Passes of the training forward."""
        x, z, y = self._sizes
        return (2 * x + y) / z

    @property
    def least_backward(self):
        x, z, y = self._sizes
        return (2 * x + 2 * y) / z

    @property
    def goal(self):
        return SLACK * self.least

    def passes(self, *phases, in_l2=False):
        _, z, _ = self._sizes
        return sum(self._bytes(launch, in_l2) for launch in self.launches(*phases)) / z

    def launches(self, *phases):
        return [launch for launch in self.counted.launches if launch.phase in phases]

    def _bytes(self, launch, in_l2):
        if not in_l2:
            return launch.bytes()
        layer, item = self.counted.problem.layer, self.counted.problem.dtype.itemsize
        read = [name for name in traffic.WEIGHTS if name in launch.tensors]
        once = layer.middle_channels * (layer.taps + layer.out_channels + 1) * item
        others = [name for name in launch.tensors if name not in traffic.WEIGHTS]
        return launch.bytes(others) + min(launch.bytes(read), self.counted.waves * once)

    def wavefronts(self, *phases):
        free = sum(launch.free_wavefronts for launch in self.launches(*phases))
        return sum(launch.wavefronts for launch in self.launches(*phases)) / free if free else 1.0


def count(problems, layout, gpu, blocks=traffic.BLOCKS):
    return [Step(counted) for counted in traffic.count(problems, layout, gpu, blocks)]


def table(steps: list[Step]) -> str:
    titles = ["layer", "layout", "least", "goal", "statistics", "forward", "together", "", "in L2", "", "norm", "of"]
    titles += ["backward", "of", "wavefronts"]
    rows = []
    for step in steps:
        together, in_l2 = step.passes(STATISTICS, FORWARD), step.passes(STATISTICS, FORWARD, in_l2=True)
        _, z, y = step._sizes
        numbers = [step.passes(STATISTICS), step.passes(FORWARD)]
        row = [step.counted.problem.layer.name, step.counted.layout, step.least, step.goal, *numbers]
        row += [together, met(together, step.goal), in_l2, met(in_l2, step.goal)]
        row += [step.passes(NORM), 2 * y / z, step.passes(BACKWARD), step.least_backward]
        row += [step.wavefronts(STATISTICS, FORWARD, NORM, BACKWARD)]
        rows.append([f"{cell:.2f}" if isinstance(cell, float) else cell for cell in row])
    sides = ["left" if title in ("layer", "layout", "") else "right" for title in titles]
    return tabulate(rows, titles, tablefmt="github", disable_numparse=True, colalign=sides)


def met(value, goal):
    return "met" if value <= goal else "missed"


def summary(steps: list[Step]) -> str:
    by_layout = defaultdict(list)
    for step in steps:
        by_layout[step.counted.layout].append(step)
    lines = []
    for layout, group in by_layout.items():
        strict = sum(step.passes(STATISTICS, FORWARD) <= step.goal for step in group)
        in_l2 = sum(step.passes(STATISTICS, FORWARD, in_l2=True) <= step.goal for step in group)
        lines.append(
            f"training forward, {layout}: within {SLACK} x least in {strict} of {len(group)}, with the weights once a "
            f"wave in {in_l2}"
        )
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m bench.traffic_norm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    traffic.add_arguments(parser)
    arguments = parser.parse_args(argv)
    gpu = dsconv_cuda.gpus()[arguments.arch]
    layers = [replace(layer, batch=arguments.batch) for layer in select(arguments.layers)]
    problems = [Problem(layer, TRAINING_BN, DTYPES[arguments.dtype]) for layer in layers]
    by_layout = [count(problems, layout, gpu, arguments.blocks) for layout in arguments.layout]
    steps = [step for together in zip(*by_layout, strict=True) for step in together]
    print(f"training through BatchNorm, in passes of z's size: {arguments.dtype}, {arguments.batch} images\n")
    print(table(steps))
    if arguments.kernels:
        for step in steps:
            print(f"\n{step.counted.problem.layer.name}, {step.counted.layout}\n\n{traffic.kernel_table(step.counted)}")
    print(f"\n{summary(steps)}")


if __name__ == "__main__":
    sys.exit(main())
