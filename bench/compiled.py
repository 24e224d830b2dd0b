"""What torch.compile makes of the modules: microseconds of a stack of small layers, eager and compiled.

    python -m bench.compiled

A stack of n layers takes `fixed + n * per layer`, told from two depths. `fixed` is what PyTorch needs to enter a graph,
to check what the graph relies on, and in training to go through its one autograd node; stacks of nn.Linear show it for
a network that has nothing of this package in it. channels_last, one thread, medians of interleaved rounds. Stock blocks
are PyTorch's modules, as they are and through fuse().
"""

import argparse
import dataclasses

import torch
from tabulate import tabulate
from torch import nn

import dsconv_cuda

from .fuse_models import inference
from .timing import WallClock, measure, thread_count

DEPTHS = (1, 9)
SIZES = ((2, 16, 7), (2, 64, 14))  # images, channels, height and width
ROUNDS, LEAST_SECONDS = 21, 4e-3
ACTIVATIONS = {"activation": "relu6", "out_activation": "relu6"}


def block(channels, before=False):
    """Modules of MobileNetV1's block; before: of MobileNetV2's, of which the first are a 1x1 convolution, a norm and an
    activation, which fuse() makes part of the chain."""
    first = [nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU6()] if before else []
    depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
    pointwise = nn.Conv2d(channels, channels, 1, bias=False)
    return nn.Sequential(*first, depthwise, nn.BatchNorm2d(channels), nn.ReLU6(), pointwise, nn.BatchNorm2d(channels))


LAYERS = {
    "DepthwiseSeparableConv2d": lambda c: dsconv_cuda.DepthwiseSeparableConv2d(c, c, 3, padding=1, **ACTIVATIONS),
    "DepthwiseSeparableConvBN2d": lambda c: dsconv_cuda.DepthwiseSeparableConvBN2d(c, c, 3, padding=1, **ACTIVATIONS),
    "stock block": block,
    "stock block, fused": lambda c: dsconv_cuda.fuse(block(c)),
    "stock block behind a norm": lambda c: block(c, True),
    "stock block behind a norm, fused": lambda c: dsconv_cuda.fuse(block(c, True)),
    "nn.Linear": lambda c: nn.Linear(c, c),
}


@dataclasses.dataclass
class Cost:
    """Seconds."""

    fixed: float
    per_layer: float


def costs(layer: str, size: tuple, training: bool, rounds=ROUNDS, least_seconds=LEAST_SECONDS, backend="inductor"):
    """{"eager" or "compiled": Cost} of stacks of this layer."""
    images, channels, width = size
    shape = (images, channels) if layer == "nn.Linear" else (images, channels, width, width)
    x = torch.randn(shape)
    x = x if x.dim() == 2 else x.contiguous(memory_format=torch.channels_last)
    calls = {}
    torch.compiler.reset()
    for depth in DEPTHS:
        stack = nn.Sequential(*(LAYERS[layer](channels) for _ in range(depth))).train(training)
        stack = stack.to(memory_format=torch.channels_last) if x.dim() == 4 else stack
        parameters = list(stack.parameters())
        for form, network in (("eager", stack), ("compiled", torch.compile(stack, fullgraph=True, backend=backend))):
            calls[form, depth] = _step(network, x, parameters) if training else inference(network, x)
    with thread_count(1):
        samples = measure(calls, rounds=rounds, least_seconds=least_seconds, clock=WallClock())
    shallow, deep = DEPTHS
    made = {}
    for form in ("eager", "compiled"):
        per_layer = (samples[form, deep].median - samples[form, shallow].median) / (deep - shallow)
        made[form] = Cost(samples[form, shallow].median - shallow * per_layer, per_layer)
    return made


def _step(network, x, parameters):
    def call():
        for p in parameters:
            p.grad = None
        network(x).sum().backward()

    return call


def table(sizes=SIZES, layers=LAYERS, **measuring) -> str:
    rows = []
    for training in (False, True):
        for layer in layers:
            for size in sizes[:1] if layer == "nn.Linear" else sizes:
                made = costs(layer, size, training, **measuring)
                eager, compiled = made["eager"], made["compiled"]
                seconds = eager.per_layer, compiled.per_layer, eager.fixed, compiled.fixed
                rows.append(
                    [
                        *(layer, "x".join(map(str, size[: 2 if layer == "nn.Linear" else 3]))),
                        "training" if training else "inference",
                        *(f"{1e6 * s:.1f}" for s in seconds),
                        f"{compiled.per_layer / eager.per_layer:.2f}",
                    ]
                )
    titles = ["", "NxCxH", "", "a layer: eager", "compiled", "fixed: eager", "compiled", "a layer, compiled over eager"]
    return tabulate(rows, titles, tablefmt="github", disable_numparse=True, colalign=("left",) * 3 + ("right",) * 5)


def main(argv=None):
    argparse.ArgumentParser(
        prog="python -m bench.compiled", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args(argv)
    print(table())


if __name__ == "__main__":
    main()
