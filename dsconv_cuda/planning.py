"""What the planner decides for a call that nobody makes, and what it had to choose from.

The decision is the library's own: csrc/cuda/cuda_plan.h for a GPU, csrc/cpu/cpu_plan.h for the CPU, pure functions of
shape, dtype, layout and machine. A GPU need not be there. What a plan predicts is a floor by a simple model
(csrc/cuda/cuda_cost.h tells its assumptions), there to put alternatives in order.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import torch

from dsconv_cuda import _checks, _loader

_OP = "plan"


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What the planner knows of a GPU. Sizes in bytes, bandwidths in bytes and rates in multiply-adds a second."""

    name: str
    capability: int  # 10 * major + minor
    multiprocessors: int
    shared_per_block: int
    shared_per_multiprocessor: int
    shared_reserved: int
    threads_per_multiprocessor: int
    blocks_per_multiprocessor: int
    l2_bytes: int
    bandwidth: float
    l2_bandwidth: float
    fma_f32: float
    fma_f64: float
    mma_f16: float  # of mma.sync with fp32 sums
    mma_tf32: float

    @property
    def architecture(self) -> str:
        return f"sm_{self.capability}"

    def __str__(self) -> str:
        return f"{self.name} ({self.architecture}, {self.multiprocessors} multiprocessors)"


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One launch, or several alike, and what they are predicted to cost."""

    name: str
    tile: tuple[int, int, int]  # rows, columns and depth of its product; zeros where it has none
    stages: int
    launches: int  # alike, one a group of images
    blocks: int  # of the one-dimensional grids of all launches
    threads: int
    shared_bytes: int
    blocks_per_multiprocessor: int
    waves: float
    multiply_adds: float
    dram_bytes: int
    l2_bytes: int
    dram_seconds: float
    l2_seconds: float
    shared_seconds: float  # of shared memory, where it is counted
    arithmetic_seconds: float
    seconds: float  # of the launch and the largest of the four

    @property
    def bound(self) -> str:
        """What bounds it: "DRAM", "L2", "shared", "arithmetic", or "launch" where that takes longer than all."""
        times = {"DRAM": self.dram_seconds, "L2": self.l2_seconds, "shared": self.shared_seconds}
        times["arithmetic"] = self.arithmetic_seconds
        slowest = max(times, key=times.get)
        return slowest if times[slowest] > self.seconds - times[slowest] else "launch"


@dataclasses.dataclass(frozen=True)
class Alternative:
    """One way to compute the call; `ours` is False for what this library has no kernels for, shown to compare with."""

    name: str
    chosen: bool
    ours: bool
    workspace_bytes: int
    kernels: tuple[Kernel, ...]

    @property
    def seconds(self) -> float:
        return sum(kernel.seconds for kernel in self.kernels)

    @property
    def dram_bytes(self) -> int:
        return sum(kernel.dram_bytes for kernel in self.kernels)


@dataclasses.dataclass(frozen=True)
class CudaPlan:
    """The planner's decision for a GPU; ``print`` shows it as a table."""

    call: str
    gpu: Gpu
    alternatives: tuple[Alternative, ...]

    @property
    def chosen(self) -> Alternative:
        return next(alternative for alternative in self.alternatives if alternative.chosen)

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        return self.chosen.kernels

    @property
    def seconds(self) -> float:
        return self.chosen.seconds

    def __str__(self) -> str:
        titles = (
            "",
            "kernel",
            "tile",
            "stages",
            "grid",
            "shared",
            "blocks/SM",
            "waves",
            "DRAM MB",
            "L2 MB",
            "us",
            "by",
        )
        rows = [row for alternative in self.alternatives for row in _rows(alternative)]
        compared = "" if all(alternative.ours for alternative in self.alternatives) else ", * not of this library"
        text = f"{self.call}\non {self.gpu}; predicted, -> chosen{compared}\n{_table([titles, *rows])}"
        if self.chosen.workspace_bytes:
            text += f"\nworkspace {_megabytes(self.chosen.workspace_bytes)} MB"
        return text


@dataclasses.dataclass(frozen=True)
class CpuPlan:
    """How the active CPU kernels would cut the call into tasks; ``print`` shows it as a table."""

    call: str
    isa: str
    threads: int
    numbers: dict[str, int]

    def __str__(self) -> str:
        rows = [(name.replace("_", " "), f"{value:,}") for name, value in self.numbers.items()]
        return f"{self.call}\non the CPU, {self.isa} kernels, {self.threads} threads\n{_table(rows)}"


def gpus() -> dict[str, Gpu]:
    """The GPUs that ``plan`` knows, by architecture; ``dataclasses.replace`` makes others of them."""
    return {limits.pop("architecture"): Gpu(**limits) for limits in _library().gpus()}


def plan(
    input_size: Sequence[int],
    out_channels: int,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    channel_multiplier: int = 1,
    *,
    activation: str | None = "identity",
    backward: bool = False,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
    arch: str | Gpu | torch.device | None = None,
) -> CudaPlan | CpuPlan:
    """What ``depthwise_separable_conv2d``, or ``...conv3d`` would run for a call, and what else it could at what cost.

    Args:
        input_size: ``[N, C, H, W]``, or ``[N, C, D, H, W]``.
        out_channels, kernel_size, stride, padding, dilation, channel_multiplier: those of DepthwiseSeparableConv2d, or
            of DepthwiseSeparableConv3d.
        activation: between the two convolutions; backward computes their intermediate again where there is one.
        backward: plan the backward, with every gradient asked for, and not the forward.
        dtype, memory_format: of the input.
        arch: an architecture such as ``"sm_90"`` (``gpus()`` lists them and the GPU that stands for each), a ``Gpu``, a
            CUDA device of this machine, or ``"cpu"``. Default: the current GPU where there is one, else the CPU.

    Where forward, or stage P of a backward in channels_last, can be split around the library's product of matrices,
    that is one of the alternatives (``"split, 32 images at a time"``, ``"backward, split"``), without out_activation
    and biases: a pass over the output for these is not counted.

    Returns a ``CudaPlan`` (``.chosen``, ``.kernels``, ``.alternatives``) or a ``CpuPlan`` (``.numbers``). Neither needs
    a GPU, and nothing is run.

    Raises ValueError for shapes that the op would refuse and for architectures that are not known.
    """
    sizes = [_checks._integer(_OP, "input_size", size) for size in input_size]
    if len(sizes) not in (4, 5) or min(sizes) < 1:
        raise ValueError(
            f"{_OP}: input_size must be [N, C, H, W] or [N, C, D, H, W], each at least 1, got {list(input_size)}"
        )
    dims = len(sizes) - 2
    channels_last = torch.channels_last if dims == 2 else torch.channels_last_3d
    if dtype not in _checks.DTYPES:
        raise ValueError(f"{_OP}: dtype must be float64, float32, bfloat16 or float16, got {dtype}")
    if memory_format not in (torch.contiguous_format, channels_last):
        raise ValueError(f"{_OP}: memory_format must be contiguous_format or {channels_last}, got {memory_format}")
    kernel = _checks.per_axis(_OP, "kernel_size", kernel_size, 1, dims)
    steps = _checks.per_axis(_OP, "stride", stride, 1, dims)
    spread = _checks.per_axis(_OP, "dilation", dilation, 1, dims)
    c_mid = sizes[1] * channel_multiplier
    query = {
        "input": sizes,
        "dw_weight": [c_mid, 1, *kernel],
        "c_out": out_channels,
        "stride": steps,
        "padding": _checks.padding(_OP, padding, kernel, steps, spread),
        "dilation": spread,
        "dtype": str(dtype).removeprefix("torch."),
        "channels_last": memory_format == channels_last,
        "backward": backward,
        "bent": activation not in (None, "none", "identity"),
    }
    call = _call_text(query)
    library = _library()
    gpu = _target(arch)
    if gpu is None:
        threads = torch.get_num_threads()
        return CpuPlan(call, library.isa_active(), threads, library.cpu_plan(**query, threads=threads))
    limits = {field.name: getattr(gpu, field.name) for field in dataclasses.fields(Gpu) if field.name != "name"}
    alternatives = tuple(
        Alternative(**{**found, "kernels": tuple(Kernel(**kernel) for kernel in found["kernels"])})
        for found in library.cuda_alternatives(**query, device=limits)
    )
    return CudaPlan(call, gpu, alternatives)


def _library():
    module = _loader.load_library().module
    if module is None:
        raise RuntimeError(f"{_OP}: the operators were registered by a library of another origin, which is not asked")
    return module


def _target(arch) -> Gpu | None:
    """The GPU that is meant, None for the CPU."""
    if arch is None:
        arch = torch.device("cuda") if torch.cuda.is_available() else "cpu"
    if isinstance(arch, Gpu):
        return arch
    if str(arch) == "cpu":
        return None
    known = gpus()
    if arch in known:
        return known[arch]
    if str(arch).split(":")[0] == "cuda":
        return _present(torch.device(arch), known)
    raise ValueError(f"{_OP}: arch must be a Gpu, a CUDA device, cpu or one of {', '.join(known)}, got {arch!r}")


def _present(device: torch.device, known: dict[str, Gpu]) -> Gpu:
    """A GPU of this machine: its own limits, and the rates of the table by its number of multiprocessors, as the op
    takes them (limits_of() of csrc/cuda/cuda_device.h)."""
    if not torch.cuda.is_available():
        raise RuntimeError(
            f"{_OP}: arch is {device}, and this machine has no GPU; name an architecture, such as 'sm_90'"
        )
    found = torch.cuda.get_device_properties(device)
    return scaled(known.values(), 10 * found.major + found.minor, found.multi_processor_count, found.name)


def scaled(known: Iterable[Gpu], capability: int, multiprocessors: int, name: str) -> Gpu:
    """The newest GPU of `known` that is not newer than `capability`, with another number of multiprocessors."""
    older = [gpu for gpu in known if gpu.capability <= capability] or list(known)[:1]
    closest = max(older, key=lambda gpu: gpu.capability)
    scale = multiprocessors / closest.multiprocessors
    rates = ("bandwidth", "l2_bandwidth", "fma_f32", "fma_f64", "mma_f16", "mma_tf32")
    return dataclasses.replace(
        closest,
        name=name,
        capability=capability,
        multiprocessors=multiprocessors,
        **{rate: getattr(closest, rate) * scale for rate in rates},
    )


def _call_text(query: dict) -> str:
    x, kernel = query["input"], query["dw_weight"][2:]
    geometry = ["x".join(map(str, kernel))]
    geometry += [f"{name} {query[name]}" for name in ("stride", "dilation") if set(query[name]) != {1}]
    if any(query["padding"]):
        geometry.append(f"padding {tuple(query['padding'])}")
    layout = "channels_last" if query["channels_last"] else "NCHW"
    return (
        f"{'backward' if query['backward'] else 'forward'} of {x} {query['dtype']} {layout}, {', '.join(geometry)}, "
        f"{query['dw_weight'][0]} -> {query['c_out']} channels"
    )


def _megabytes(size: float) -> str:
    return f"{size / 1e6:.2f}"


def _rows(alternative: Alternative):
    mark = "->" if alternative.chosen else "" if alternative.ours else "*"
    for index, kernel in enumerate(alternative.kernels):
        launch = (
            "x".join(map(str, kernel.tile)) if any(kernel.tile) else "",
            str(kernel.stages or ""),
            f"{kernel.blocks} x {kernel.threads}" + (f" in {kernel.launches}" if kernel.launches > 1 else ""),
            str(kernel.shared_bytes),
            str(kernel.blocks_per_multiprocessor),
            f"{kernel.waves:.2f}",
        )
        yield (
            mark if index == 0 else "",
            kernel.name,
            *(launch if alternative.ours else [""] * len(launch)),
            _megabytes(kernel.dram_bytes),
            _megabytes(kernel.l2_bytes),
            f"{kernel.seconds * 1e6:.1f}",
            kernel.bound,
        )
    if len(alternative.kernels) > 1:
        yield ("", f"= {alternative.name}", *[""] * 6, _megabytes(alternative.dram_bytes), "",
               f"{alternative.seconds * 1e6:.1f}", "")  # fmt: skip


def _table(lines) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
