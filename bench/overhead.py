"""What a call costs beside its arithmetic, of a layer that is done in no time: forward without gradients, and a step of
training, which is forward and backward for all gradients.

    python -m bench.overhead

Measured is what the fused op, the function and the module take above an op that does nothing but allocate the output;
in training above an autograd Function that does nothing. Beside them PyTorch's two convolutions. Microseconds, one
thread, medians of interleaved rounds.
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
EMPTY, EMPTY_FUNCTION = "new_empty", "empty autograd.Function"
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


def training_calls(channels, size, out_channels):
    """{what: a step of it}: y = f(x), and the gradients of x and of all parameters."""
    arguments = ARGUMENTS | {"out_activation": "identity"}
    module = dsconv_cuda.DepthwiseSeparableConv2d(channels, out_channels, 3, bias=True, **arguments)
    plain = PlainSeparableConv2d(channels, out_channels, 3, bias=True, **arguments)
    x = torch.randn(1, channels, size, size, requires_grad=True)
    dy = torch.randn(1, out_channels, size, size)
    y, grads = torch.empty_like(dy), [torch.empty_like(t) for t in (x, *module.parameters())]

    class Empty(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            ctx.save_for_backward(*inputs)
            return y.detach()

        @staticmethod
        def backward(ctx, dy):
            _ = ctx.saved_tensors
            return tuple(grads)

    _loader.load_library()
    fwd, bwd = torch.ops.dsconv_cuda.fwd.default, torch.ops.dsconv_cuda.bwd.default
    relu6, identity = (ACTIVATIONS[arguments[name]].number for name in ("activation", "out_activation"))
    dw_weight, dw_bias = module.depthwise.weight, module.depthwise.bias
    pw_weight, pw_bias = module.pointwise.weight, module.pointwise.bias

    def ops():
        geometry = [1, 1], [1, 1, 1, 1], [1, 1]
        with torch.no_grad():
            fwd(x, dw_weight, pw_weight, dw_bias, pw_bias, *geometry, relu6, identity)
            bwd(dy, x, dw_weight, pw_weight, dw_bias, None, *geometry, relu6, identity, 31)

    def function(x, dw_weight, dw_bias, pw_weight, pw_bias):
        return dsconv_cuda.depthwise_separable_conv2d(x, dw_weight, pw_weight, dw_bias, pw_bias, **arguments)

    def step(forward, parameters):
        return lambda: torch.autograd.grad(forward(), (x, *parameters), dy)

    ours, theirs = list(module.parameters()), list(plain.parameters())
    return {
        EMPTY_FUNCTION: step(lambda: Empty.apply(x, *ours), ours),
        "torch.ops.dsconv_cuda.fwd and bwd": ops,
        "depthwise_separable_conv2d": step(lambda: function(x, *ours), ours),
        "DepthwiseSeparableConv2d": step(lambda: module(x), ours),
        "two nn.Conv2d and nn.ReLU6": step(lambda: plain(x), theirs),
    }


def overheads(size, rounds=ROUNDS, least_seconds=LEAST_SECONDS, *, training=False):
    """[(what, microseconds, microseconds above the first, which is empty)]"""
    timed = training_calls(*size) if training else calls(*size)
    with thread_count(1), torch.set_grad_enabled(training):
        samples = measure(timed, rounds=rounds, least_seconds=least_seconds, clock=WallClock())
    empty = next(iter(samples.values())).median
    return [(what, 1e6 * sample.median, 1e6 * (sample.median - empty)) for what, sample in samples.items()]


def main(argv=None):
    argparse.ArgumentParser(
        prog="python -m bench.overhead", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args(argv)
    for size in SIZES:
        channels, width, out_channels = size
        for training in (False, True):
            table = overheads(size, training=training)
            rows = [(what, f"{total:.2f}", f"{above:.2f}") for what, total, above in table]
            what = "a step of training" if training else "forward"
            print(f"{channels} channels, {width}x{width}, 3x3, to {out_channels} channels, {what}\n")
            titles = ["", "microseconds", f"above the {EMPTY_FUNCTION if training else 'empty op'}"]
            print(tabulate(rows, titles, tablefmt="github", disable_numparse=True, colalign=["left", "right", "right"]))
            print()


if __name__ == "__main__":
    main()
