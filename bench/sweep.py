"""Random layers beyond the list: odd channel counts, strides 2 and 3, dilation 2, one-row inputs, a channel multiplier.

The same seed gives the same layers on every machine. Those that a fast core could finish in less than LEAST_SECONDS are
drawn again: there a call's fixed costs decide, which bench/overhead.py measures. So are those above MOST_SECONDS.
"""

import random
import statistics

import torch
from tabulate import tabulate

from .competitors import FUSED
from .layers import Layer
from .problem import FORWARD, Problem
from .report import SHORT

NOMINAL_FLOPS = 1.2e11  # a second, of one fast core
LEAST_SECONDS, MOST_SECONDS = 6e-5, 4e-3  # of a forward at that rate
CHANNELS = (3, 16, 17, 24, 37, 48, 64, 96, 113, 128, 200, 256, 331, 512)
LONGEST_ROW = 1600
WORST = 10


def random_layers(count, seed):
    draw = random.Random(seed)
    layers = []
    while len(layers) < count:
        layer = _random_layer(draw)
        seconds = Problem(layer, FORWARD, torch.float32).flops / NOMINAL_FLOPS
        if LEAST_SECONDS <= seconds <= MOST_SECONDS:
            layers.append(layer)
    return tuple(layers)


def _random_layer(draw):
    batch = draw.choice((1, 1, 1, 2, 4, 8, 16))
    channels, out_channels = draw.choice(CHANNELS), draw.choice(CHANNELS)
    kernel = draw.choice(
        ((1, 1), (2, 2), (3, 3), (3, 3), (3, 3), (4, 4), (5, 5), (5, 5), (6, 6), (7, 7), (3, 5), (7, 2))
    )
    height, width = draw.randint(5, 120), draw.randint(5, 120)
    if draw.random() < 1 / 6:
        kernel, height, width = (1, draw.randint(1, 7)), 1, draw.randint(50, LONGEST_ROW)
    stride, dilation = draw.choice((1, 1, 1, 2, 2, 3)), draw.choice((1, 1, 1, 2))
    multiplier = draw.choice((1, 1, 1, 2))
    out_activation = draw.choice(("relu6", "identity"))
    name = (
        f"n{batch} {channels}{'x2' if multiplier == 2 else ''}->{out_channels} {height}x{width} "
        f"k{kernel[0]}x{kernel[1]} s{stride} d{dilation}"
    )
    return Layer(
        name, batch, channels, height, width, kernel, stride, dilation, out_channels, out_activation, multiplier
    )


def sweep_tables(result):
    """For each mode and thread count the geometric means and the layers that are furthest from the limit."""
    for mode, threads in dict.fromkeys((m.problem.mode, m.threads) for m in result.measurements):
        group = [m for m in result.measurements if (m.problem.mode, m.threads) == (mode, threads)]
        dtype = str(group[0].problem.dtype).removeprefix("torch.")
        rows = sorted((row for measurement in group for row in _rows(result, measurement)), reverse=True)
        lines = [
            f"{mode}, {dtype}, {threads} thread(s), {len(group)} random layers: multiples of the limit, worst first"
        ]
        for layout in dict.fromkeys(row[1] for row in rows):
            ours, gains = zip(*((row[0], row[4]) for row in rows if row[1] == layout), strict=True)
            lines.append(f"{layout}: geometric mean {statistics.geometric_mean(ours):.2f}{_gain_text(gains)}")
        body = [
            [name, layout, bound, f"{multiple:.2f}", f"{gain:.2f}" if gain else ""]
            for multiple, layout, name, bound, gain in rows[:WORST]
        ]
        titles = ["layer", "layout", "limit", "ours", "gain"]
        alignment = ["left", "left", "left", "right", "right"]
        table = tabulate(body, titles, tablefmt="github", disable_numparse=True, colalign=alignment)
        yield "\n".join([*lines, "", table])


def _rows(result, measurement):
    multiples, gains = result.multiples(measurement), measurement.gains()
    for form, multiple in multiples.items():
        if form.method == FUSED:
            yield (
                multiple,
                SHORT[form.layout],
                measurement.problem.layer.name,
                result.limit(measurement)[1],
                gains.get(form, 0.0),
            )


def _gain_text(gains):
    if not all(gains):
        return ""
    return (
        f"; gain over PyTorch's best {statistics.geometric_mean(gains):.2f}, least {min(gains):.2f}, "
        f"below 1 in {sum(gain < 1 for gain in gains)}"
    )
