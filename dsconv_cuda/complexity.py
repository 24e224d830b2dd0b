"""What layers cost: multiply-adds, parameters, bytes, and which limit of a machine they meet.

The formulas are those of MobileNetV1 (arXiv:1704.04861, section 3.1), for a D_F x D_F output, M input and N output
channels and a D_K x D_K kernel:

    standard    D_F^2 M N D_K^2
    depthwise   D_F^2 M D_K^2
    pointwise   D_F^2 M N
    ratio       (depthwise + pointwise) / standard = 1/N + 1/D_K^2

So a separable pair saves the more the larger N and D_K are: the first term goes with the output channels, the second
with the taps. With 3 x 3 kernels the saving ends at 9 times, however many channels there are.

Saved multiply-adds are not saved time by themselves. A depthwise convolution makes D_K^2 multiply-adds for each element
it reads and writes, which is less than any machine needs to be busy: it waits for memory. :func:`table` shows that for
each layer of a model, and what becomes of it when the pair is one operation and the intermediate is never in memory.
"""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

Extent = int | Sequence[int]


def _points(extent: Extent) -> int:
    """The points of a square, or of the rectangle or box given by its sides."""
    return extent * extent if isinstance(extent, int) else math.prod(extent)


def standard_macs(d_f: Extent, m: int, n: int, d_k: Extent) -> int:
    """Multiply-adds of a standard convolution: ``D_F^2 * M * N * D_K^2``.

    Args:
        d_f: side of the square output, or its sides as a sequence (of any length: one for 1-D, three for 3-D).
        m, n: input and output channels.
        d_k: side of the square kernel, or its sides.

    The other functions of this module take the same four numbers, so that one tuple describes a layer.
    """
    return _points(d_f) * m * n * _points(d_k)


def depthwise_macs(d_f: Extent, m: int, n: int, d_k: Extent) -> int:
    """Multiply-adds of the depthwise half: ``D_F^2 * M * D_K^2``; n has no part in it."""
    return _points(d_f) * m * _points(d_k)


def pointwise_macs(d_f: Extent, m: int, n: int, d_k: Extent = 1) -> int:
    """Multiply-adds of the 1x1 half: ``D_F^2 * M * N``; d_k has no part in it."""
    return _points(d_f) * m * n


def separable_macs(d_f: Extent, m: int, n: int, d_k: Extent) -> int:
    """Multiply-adds of the pair: ``D_F^2 * M * (D_K^2 + N)``."""
    return depthwise_macs(d_f, m, n, d_k) + pointwise_macs(d_f, m, n, d_k)


def ratio(d_f: Extent, m: int, n: int, d_k: Extent) -> float:
    """:func:`separable_macs` over :func:`standard_macs`: ``1/N + 1/D_K^2``, whatever d_f and m are."""
    return 1 / n + 1 / _points(d_k)


# ---- the table ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """Two ceilings. The defaults are measured ones of one AMD Zen 4 core: fp32 multiply-adds, and DRAM."""

    flops: float = 118e9  # a second; a multiply-add is two
    bandwidth: float = 25e9  # bytes a second


@dataclass(frozen=True)
class Work:
    """What one operation has to do at least: its multiply-adds, and each operand in and each result out once."""

    macs: int
    bytes: int

    @property
    def intensity(self) -> float:
        """Floating point operations for each byte."""
        return 2 * self.macs / self.bytes if self.bytes else 0.0

    def seconds(self, machine: Machine) -> float:
        return max(2 * self.macs / machine.flops, self.bytes / machine.bandwidth)

    def bound(self, machine: Machine) -> str:
        return "compute" if 2 * self.macs / machine.flops > self.bytes / machine.bandwidth else "memory"


@dataclass(frozen=True)
class Row:
    """One layer, or a depthwise convolution and the pointwise one after it."""

    name: str
    kind: str
    output: tuple[int, ...]
    parameters: int
    unfused: tuple[Work, ...]  # one for each operation
    fused: Work

    @property
    def macs(self) -> int:
        return self.fused.macs

    @property
    def bytes_unfused(self) -> int:
        return sum(work.bytes for work in self.unfused)

    @property
    def bytes_fused(self) -> int:
        return self.fused.bytes


COLUMNS = (
    "layer",
    "kind",
    "output",
    "MACs",
    "parameters",
    "bytes unfused",
    "bytes fused",
    "FLOP/byte unfused",
    "FLOP/byte fused",
    "bound unfused",
    "bound fused",
    "gain",
)


@dataclass(frozen=True)
class Table:
    """What :func:`table` returns: ``str()`` of it is text, and there are :meth:`csv` and :meth:`plot`."""

    rows: tuple[Row, ...]
    other_parameters: int  # of layers that have no row
    machine: Machine

    @property
    def macs(self) -> int:
        return sum(row.macs for row in self.rows)

    @property
    def parameters(self) -> int:
        return sum(row.parameters for row in self.rows) + self.other_parameters

    @property
    def bytes_unfused(self) -> int:
        return sum(row.bytes_unfused for row in self.rows)

    @property
    def bytes_fused(self) -> int:
        return sum(row.bytes_fused for row in self.rows)

    def _gain(self, rows: Sequence[Row]) -> float:
        """How many times longer the unfused form takes, where both take no longer than their limits let them."""
        fused = sum(row.fused.seconds(self.machine) for row in rows)
        return sum(work.seconds(self.machine) for row in rows for work in row.unfused) / fused if fused else 1.0

    def _records(self) -> list[tuple]:
        records = []
        for row in self.rows:
            unfused = Work(row.macs, row.bytes_unfused)
            records.append(
                (
                    row.name,
                    row.kind,
                    "x".join(map(str, row.output)),
                    row.macs,
                    row.parameters,
                    row.bytes_unfused,
                    row.bytes_fused,
                    round(unfused.intensity, 3),
                    round(row.fused.intensity, 3),
                    " + ".join(work.bound(self.machine) for work in row.unfused),
                    row.fused.bound(self.machine),
                    round(self._gain([row]), 3),
                )
            )
        if self.other_parameters:
            records.append(("other layers", "", "", 0, self.other_parameters, 0, 0, "", "", "", "", ""))
        total, total_unfused = Work(self.macs, self.bytes_fused), Work(self.macs, self.bytes_unfused)
        records.append(
            (
                "total",
                "",
                "",
                self.macs,
                self.parameters,
                self.bytes_unfused,
                self.bytes_fused,
                round(total_unfused.intensity, 3),
                round(total.intensity, 3),
                "",
                "",
                round(self._gain(self.rows), 3),
            )
        )
        return records

    def csv(self) -> str:
        """Comma-separated values: a line of titles, one for each row, the total last."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(self._records())
        return text.getvalue()

    def __str__(self) -> str:
        lines = [COLUMNS, *([f"{v:,}" if isinstance(v, int) else str(v) for v in r] for r in self._records())]
        widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
        numeric = [i for i, title in enumerate(COLUMNS) if title not in ("layer", "kind", "output")]
        aligned = [
            "  ".join(
                v.rjust(w) if i in numeric else v.ljust(w) for i, (v, w) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        rule = "-" * max(map(len, aligned))
        return "\n".join([aligned[0], rule, *aligned[1:-1], rule, aligned[-1]])

    def plot(self, path):
        """Draws the rows under the machine's roofline and writes the picture to `path`; needs matplotlib.

        Each pair is two points, unfused (hollow) and fused (filled), joined by a line. Returns the figure.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("dsconv_cuda.complexity: plot() needs matplotlib: pip install matplotlib") from error
        machine = self.machine
        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.add_subplot(xscale="log", yscale="log")

        def attained(works):
            """FLOP per byte of all together, and the FLOP/s that they reach one after the other at their limits."""
            macs, moved = sum(w.macs for w in works), sum(w.bytes for w in works)
            return 2 * macs / moved, 2 * macs / sum(w.seconds(machine) for w in works)

        points = [(row, attained(row.unfused), attained([row.fused])) for row in self.rows if row.macs]
        pairs = [p for p in points if len(p[0].unfused) > 1]
        for _, before, after in pairs:
            axes.plot(*zip(before, after, strict=True), color="tab:blue", linewidth=0.6)
        for label, marked, style in (
            ("pair, unfused", [p[1] for p in pairs], {"facecolors": "none", "edgecolors": "tab:blue"}),
            ("pair, fused", [p[2] for p in pairs], {"color": "tab:blue"}),
            ("other layer", [p[2] for p in points if len(p[0].unfused) == 1], {"color": "tab:gray", "marker": "s"}),
        ):
            if marked:
                axes.scatter(*zip(*marked, strict=True), label=label, s=24, zorder=3, **style)
        balance = machine.flops / machine.bandwidth
        ends = [i for p in points for i, _ in p[1:]] + [balance]
        left, right = min(ends) / 2, max(ends) * 2
        roof = [min(machine.flops, i * machine.bandwidth) for i in (left, balance, right)]
        axes.plot((left, balance, right), roof, color="black", label="limit of the machine")
        axes.set_xlabel("FLOP per byte")
        axes.set_ylabel("FLOP/s")
        axes.legend()
        figure.savefig(path)
        return figure


def table(model: nn.Module, input_size: Sequence[int], *, dtype=torch.float32, machine: Machine | None = None) -> Table:
    """What each convolution and linear layer of `model` costs for one input of `input_size` (batch included).

    The model runs once, on the meta device: nothing is computed and the model is not changed.

    A fused module, and two convolutions that :func:`dsconv_cuda.fuse` would fuse or has fused, have one row, with two
    operations unfused and one fused. Bytes count every operand of an operation
    once, in `dtype`, and its parameters: unfused x + 2z + y, fused x + y. Activations and normalisations are counted
    nowhere, as if each were part of the convolution before it; PyTorch in eager mode moves more. Taps that fall into
    the padding count as multiply-adds, as in the formulas.

    Args:
        model: a network or a single layer; its forward takes one tensor.
        input_size: shape of that tensor, for example ``(1, 3, 224, 224)``.
        dtype: of which the bytes are counted.
        machine: the ceilings that the bounds and the gain are told from; :class:`Machine`'s own by default.

    Returns:
        A :class:`Table`: printable, and with ``csv()``, ``plot(path)`` and ``rows``.
    """
    from dsconv_cuda import fusion
    from dsconv_cuda.fusion import find

    parameters = list(model.parameters())
    if any(find.chain_of(module) is not None for module in model.modules()):
        model = fusion.unfuse(model)
    second_of = {f.chain.depthwise: f.chain.pointwise for f in find.find(model) if f.chain is not None}
    rows, counted, first_of = [], set(), {}
    for name, module, x, y in _record_calls(model, input_size):
        convolutions = (module.depthwise, module.pointwise) if _is_pair(module) else (module,)
        counted.update(id(p) for conv in convolutions for p in conv.parameters())
        if module in second_of:
            first_of[second_of[module]] = (name, module, x)
        elif module in first_of:
            name, first, x = first_of[module]
            rows.append(_pair(name, first, module, x, y, dtype.itemsize))
        elif _is_pair(module):
            rows.append(_pair(name or type(module).__name__, module.depthwise, module.pointwise, x, y, dtype.itemsize))
        else:
            work = _work(module, x, y, dtype.itemsize)
            rows.append(Row(name or type(module).__name__, _kind(module), tuple(y), _size(module), (work,), work))
    other = sum(p.numel() for p in parameters if id(p) not in counted)
    return Table(tuple(rows), other, machine or Machine())


def _record_calls(model: nn.Module, input_size: Sequence[int]) -> list[tuple[str, nn.Module, torch.Size, torch.Size]]:
    """(name, module, shape of its input, shape of its output) for each call of a module that has a row."""
    from dsconv_cuda.fusion.untouched import untouched

    calls, hooks = [], []
    modes = {module: module.training for module in model.modules()}

    def recorder(name):
        return lambda module, inputs, output: calls.append((name, module, inputs[0].shape, output.shape))

    inside = {child for module in model.modules() if _is_pair(module) for child in module.children()}
    for name, module in model.named_modules():
        if _has_row(module) and module not in inside:
            hooks.append(module.register_forward_hook(recorder(name)))
    state = {
        name: torch.empty_like(tensor, device="meta")
        for tensors in (model.named_parameters(), model.named_buffers())
        for name, tensor in tensors
    }
    floating = [t.dtype for t in state.values() if t.is_floating_point()]
    x = torch.empty(tuple(input_size), device="meta", dtype=floating[0] if floating else torch.float32)
    try:
        model.eval()  # BatchNorm refuses to train on one pixel
        with untouched(model), torch.no_grad():
            torch.func.functional_call(model, state, (x,))
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.training = training
    return calls


def _is_pair(module: nn.Module) -> bool:
    from dsconv_cuda.fusion.find import FUSED_MODULES

    return isinstance(module, FUSED_MODULES)


def _has_row(module: nn.Module) -> bool:
    return isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)) or _is_pair(module)


def _pair(name: str, first: nn.Module, second: nn.Module, x: torch.Size, y: torch.Size, itemsize: int) -> Row:
    z = [*y]
    z[-1 - len(first.kernel_size)] = first.out_channels
    works = _work(first, x, z, itemsize), _work(second, z, y, itemsize)
    fused = Work(works[0].macs + works[1].macs, sum(w.bytes for w in works) - 2 * math.prod(z) * itemsize)
    return Row(name, f"{_kind(first)} + 1x1", tuple(y), _size(first) + _size(second), works, fused)


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _work(module: nn.Module, x: Sequence[int], y: Sequence[int], itemsize: int) -> Work:
    """Of one convolution or linear layer: each output is a sum over one filter."""
    weight, bias = module.weight, module.bias
    elements = math.prod(x) + math.prod(y) + weight.numel() + (0 if bias is None else bias.numel())
    return Work(math.prod(y) * weight[0].numel(), elements * itemsize)


def _kind(module: nn.Module) -> str:
    if isinstance(module, nn.Linear):
        return "linear"
    kernel = "x".join(map(str, module.kernel_size))
    stride = "" if set(module.stride) == {1} else f" s{'x'.join(map(str, dict.fromkeys(module.stride)))}"
    depthwise = "depthwise " if module.groups == module.in_channels > 1 else ""
    return f"{depthwise}{kernel}{stride}"
