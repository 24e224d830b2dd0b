"""How far training through BatchNorm is from float64, beside stock modules in the same dtype: CPU or, where there is
one, GPU.

    python -m bench.accuracy > accuracy.md                # fp32 and bf16, both layouts, ReLU and ReLU6
    python -m bench.accuracy --device cuda --dtype float16 --seeds 10

For the output, every gradient and every running statistic: the largest difference from stock modules in float64, over
the largest value there, of the block / of stock modules in the same dtype and layout; medians over seeds and layers (a
value near a corner of an activation takes the other side now and then, in one or the other). The ratio is to be at most
2. tests/test_batchnorm_block.py checks each single step, against the largest error of stock modules over several orders
of summation.
"""

import argparse
import copy
import itertools
import statistics
import sys
from collections import defaultdict
from dataclasses import dataclass

import torch
from tabulate import tabulate
from torch import Tensor, nn

from dsconv_cuda import DepthwiseSeparableConvBN2d
from dsconv_cuda.activations import ACTIVATIONS

from .plain import LAYOUTS
from .problem import DTYPES

# Input channels, output channels, kernel, stride, size: as in MobileNetV1, V2 and EfficientNet, on smaller maps.
LAYERS = ((32, 64, 3, 1, 28), (64, 128, 3, 2, 28), (144, 24, 3, 1, 14), (96, 96, 5, 1, 14))
IMAGES = 4


class Plain(nn.Module):
    """The four modules that the block stands for, with its names."""

    def __init__(self, block: nn.Module):
        super().__init__()
        for name, child in copy.deepcopy(block).named_children():
            setattr(self, name, child)
        self.activation = ACTIVATIONS[block.activation].value
        self.out_activation = ACTIVATIONS[block.out_activation].value

    def forward(self, x):
        a = self.activation(self.bn1(self.depthwise(x)))
        return self.out_activation(self.bn2(self.pointwise(a)))


def results(module: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """The output, the gradients and the running statistics after one step, by name."""
    module = copy.deepcopy(module)
    x = x.detach().requires_grad_()
    out = module(x)
    named = dict(module.named_parameters())
    grads = torch.autograd.grad(out, [x, *named.values()], dy)
    found = {"out": out.detach()} | dict(zip(("grad x", *(f"grad {n}" for n in named)), grads, strict=True))
    return found | {name: buffer for name, buffer in module.named_buffers() if buffer.is_floating_point()}


# By the dimensions of an image.
CHANNELS_LAST = {1: (), 2: (torch.channels_last,), 3: (torch.channels_last_3d,)}


def stock_in_several_orders(plain: nn.Module, x: Tensor, dy: Tensor):
    for memory_format in (torch.contiguous_format, *CHANNELS_LAST[x.dim() - 2]):
        yield results(plain, x.contiguous(memory_format=memory_format), dy)
    # Channels in the other order, images in the other order, pixels in every order of two axes.
    other = copy.deepcopy(plain)
    flips = {"depthwise.weight": 0, "depthwise.bias": 0, "pointwise.weight": 1}
    flips |= {f"bn1.{name}": 0 for name in ("weight", "bias", "running_mean", "running_var")}
    with torch.no_grad():
        for name, value in other.state_dict().items():
            if name in flips:
                value.copy_(value.flip(flips[name]))
    found = results(other, x.flip(1), dy)
    dims = {f"grad {name}": dim for name, dim in flips.items()} | flips | {"grad x": 1}
    yield {name: value.flip(dims[name]) if name in dims else value for name, value in found.items()}
    found = results(plain, x.flip(0), dy.flip(0))
    yield {name: value.flip(0) if name in ("out", "grad x") else value for name, value in found.items()}
    for axes in itertools.combinations(range(2, x.dim()), 2):
        turned = copy.deepcopy(plain)
        convolution = turned.depthwise
        convolution.weight = nn.Parameter(convolution.weight.detach().transpose(*axes).contiguous())
        for attribute in ("stride", "padding", "dilation"):
            given = getattr(convolution, attribute)
            if given != "same":
                setattr(convolution, attribute, exchanged(given, *(axis - 2 for axis in axes)))
        found = results(turned, x.transpose(*axes), dy.transpose(*axes))
        images = ("out", "grad x", "grad depthwise.weight")
        yield {name: value.transpose(*axes) if name in images else value for name, value in found.items()}


def exchanged(values: tuple, i: int, j: int) -> tuple:
    values = list(values)
    values[i], values[j] = values[j], values[i]
    return tuple(values)


@dataclass(frozen=True)
class Error:
    """The largest differences from stock modules in float64, and the largest value there."""

    ours: float
    stock: float  # the largest over several orders of summation
    alone: float  # in the layout of the input
    size: float


def errors(block: nn.Module, x: Tensor, device) -> dict[str, Error]:
    """Of one training step of the block in the dtype of x, by name."""
    dtype = x.dtype
    plain = Plain(block)
    with torch.no_grad():
        dy = torch.randn(copy.deepcopy(plain)(x).shape).to(dtype)
    exact = results(copy.deepcopy(plain).double(), x.double(), dy.double())
    # float64 has no more precise oracle: its own error is that of float32, scaled.
    measured = torch.float32 if dtype == torch.float64 else dtype
    scale = torch.finfo(dtype).eps / torch.finfo(measured).eps
    arguments = plain.to(measured), x.to(measured), dy.to(measured)
    stock = list(stock_in_several_orders(*arguments))
    with torch.backends.mkldnn.flags(enabled=False):  # PyTorch's own convolutions sum in other orders than oneDNN's
        stock += stock_in_several_orders(*arguments)
    plain.to(dtype)
    actual = results(block.to(device), x.to(device), dy.to(device))
    assert actual.keys() == exact.keys()
    return {
        name: Error(
            largest_difference(value, exact[name]),
            scale * max(largest_difference(found[name], exact[name]) for found in stock),
            scale * largest_difference(stock[1 if is_channels_last(x) else 0][name], exact[name]),
            exact[name].abs().max().item() if exact[name].numel() else 0.0,
        )
        for name, value in actual.items()
    }


def is_channels_last(x: Tensor) -> bool:
    formats = CHANNELS_LAST[x.dim() - 2]
    return any(x.is_contiguous(memory_format=f) for f in formats) and not x.is_contiguous()


def largest_difference(a: Tensor, b: Tensor) -> float:
    return (a.cpu().double() - b.cpu().double()).abs().max().item() if a.numel() else 0.0


# ------------------------------------------------------------------------------------------------------------- report


def measured(dtype, memory_format, activation, seeds, device) -> dict[str, tuple[float, float]]:
    """{name: (ours, stock modules')}, relative to the largest value, medians over seeds and layers."""
    found = defaultdict(list)
    for seed in range(seeds):
        torch.manual_seed(seed)
        for c_in, c_out, kernel, stride, size in LAYERS:
            block = DepthwiseSeparableConvBN2d(
                c_in, c_out, kernel, stride, kernel // 2, activation=activation, out_activation=activation
            )
            with torch.no_grad():
                for norm in (block.bn1, block.bn2):
                    norm.weight.uniform_(0.5, 2)
                    norm.bias.normal_()
            x = (3 * torch.randn(IMAGES, c_in, size, size) + 1).contiguous(memory_format=memory_format)
            for name, error in errors(block.to(dtype), x.to(dtype), device).items():
                found[name].append((error.ours / error.size, error.alone / error.size))
    return {name: tuple(map(statistics.median, zip(*pairs, strict=True))) for name, pairs in found.items()}


def table(columns: dict[str, dict[str, tuple[float, float]]]) -> str:
    """A line for each value; for each column ours / stock modules', and the ratio."""
    names = list(next(iter(columns.values())))
    rows = [
        [
            name,
            *(f"{ours:.1e} / {stock:.1e} = {ours / stock:.2f}" for ours, stock in (c[name] for c in columns.values())),
        ]
        for name in names
    ]
    worst = ["largest ratio", *(f"{max(ours / stock for ours, stock in c.values()):.2f}" for c in columns.values())]
    return tabulate([*rows, worst], ["", *columns], tablefmt="github", disable_numparse=True)


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m bench.accuracy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    parser.add_argument("--activation", nargs="+", choices=ACTIVATIONS, default=["relu", "relu6"])
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args(argv)
    print(
        f"Errors against float64 of one training step of the block with BatchNorm, ours / stock modules' = ratio: "
        f"largest difference over largest value, medians over {arguments.seeds} seeds and {len(LAYERS)} layers"
    )
    for dtype in arguments.dtype:
        columns = {
            f"{activation}, {layout}": measured(
                DTYPES[dtype], LAYOUTS[layout], activation, arguments.seeds, torch.device(arguments.device)
            )
            for activation in arguments.activation
            for layout in arguments.layout
        }
        print(f"\n{dtype}\n\n{table(columns)}")


if __name__ == "__main__":
    sys.exit(main())
