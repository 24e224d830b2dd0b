"""What a call costs beside its arithmetic: forward without gradients, of a layer that is done in no time.

    python -m bench.overhead

Measured is what the fused op, the function and the module take above an op that does nothing but allocate the output;
beside them PyTorch's two convolutions. Microseconds, one thread, medians of interleaved rounds.
"""

import argparse

import torch
import torch.nn.functional as F
from tabulate import tabulate

import dsconv_cuda
from dsconv_cuda import _loader
from dsconv_cuda.activations import ACTIVATIONS

from .plain import PlainSeparableConv2d
from .timing import WallClock, measure, thread_count

SIZES = ((1, 1, 1), (8, 4, 8))  # channels, height and width, output channels
ROUNDS = 31
LEAST_SECONDS = 2e-3
EMPTY = "new_empty"
ARGUMENTS = {"stride": 1, "padding": 1, "activation": "relu6", "out_activation": "relu6"}


def calls(channels, size, out_channels):
    """{what: a call of it}, each with the same tensors."""
    module = dsconv_cuda.DepthwiseSeparableConv2d(channels, out_channels, 3, bias=True, **ARGUMENTS)
    plain = PlainSeparableConv2d(channels, out_channels, 3, bias=True, **ARGUMENTS)
    dw_weight, dw_bias = module.depthwise.weight.detach(), module.depthwise.bias.detach()
    pw_weight, pw_bias = module.pointwise.weight.detach(), module.pointwise.bias.detach()
    x = torch.randn(1, channels, size, size)
    y_shape = (1, out_channels, size, size)
    _loader.load_library()
    fwd = torch.ops.dsconv_cuda.fwd.default
    relu6 = ACTIVATIONS["relu6"].number

    def two_convolutions():
        z = F.conv2d(x, dw_weight, dw_bias, 1, 1, groups=channels)
        return F.conv2d(z, pw_weight, pw_bias)

    return {
        EMPTY: lambda: x.new_empty(y_shape),
        "torch.ops.dsconv_cuda.fwd": lambda: fwd(
            x, dw_weight, pw_weight, dw_bias, pw_bias, [1, 1], [1, 1, 1, 1], [1, 1], relu6, relu6
        ),
        "depthwise_separable_conv2d": lambda: dsconv_cuda.depthwise_separable_conv2d(
            x, dw_weight, pw_weight, dw_bias, pw_bias, **ARGUMENTS
        ),
        "DepthwiseSeparableConv2d": lambda: module(x),
        "two F.conv2d": two_convolutions,
        "two nn.Conv2d and nn.ReLU6": lambda: plain(x),
    }


def overheads(size, rounds=ROUNDS, least_seconds=LEAST_SECONDS):
    """[(what, microseconds, microseconds above the empty op)]"""
    with thread_count(1), torch.no_grad():
        samples = measure(calls(*size), rounds=rounds, least_seconds=least_seconds, clock=WallClock())
    empty = samples[EMPTY].median
    return [(what, 1e6 * sample.median, 1e6 * (sample.median - empty)) for what, sample in samples.items()]


def main(argv=None):
    argparse.ArgumentParser(
        prog="python -m bench.overhead", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args(argv)
    for size in SIZES:
        channels, width, out_channels = size
        rows = [(what, f"{total:.2f}", f"{above:.2f}") for what, total, above in overheads(size)]
        print(f"{channels} channels, {width}x{width}, 3x3, to {out_channels} channels\n")
        titles = ["", "microseconds", "above the empty op"]
        print(tabulate(rows, titles, tablefmt="github", disable_numparse=True, colalign=["left", "right", "right"]))
        print()


if __name__ == "__main__":
    main()
