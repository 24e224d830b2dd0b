"""Argument checks of the public functions.

Every message names the op, the argument, what is expected, what was given and, where it helps, what to do. The checks
run on every call, so attributes of tensors, which cost a tenth of a microsecond each, are read once.
"""

import operator

import torch
from torch import Tensor

ARGUMENTS = ("input", "dw_weight", "pw_weight", "dw_bias", "pw_bias")
_FIRST_BIAS = 3
_AXES = ("depth", "height", "width")
WIDE = frozenset((torch.float32, torch.float64))
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
DEVICES = ("cpu", "cuda", "meta")
_MAX_EXTENT = 2**61  # csrc/op_args.h: a quarter of what 64 bits hold


_NUMBERS = {1: "an int", 2: "an int or a pair of ints", 3: "an int or three ints"}


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type that kernels compute in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _integer(op: str, argument: str, value, dims: int = 2) -> int:
    if isinstance(value, torch.SymInt):
        return value
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{op}: {argument} must be {_NUMBERS[dims]}, got {value!r} ({type(value).__name__})") from None


def per_axis(op: str, argument: str, value, least: int, dims: int = 2) -> tuple[int, ...]:
    """`value`, an int or a sequence of one or `dims`, as one number for each axis, each at least `least`."""
    if type(value) is int:
        result = (value,) * dims
    elif isinstance(value, (tuple, list, torch.Size)):
        if len(value) not in (1, dims):
            raise ValueError(f"{op}: {argument} must be {_NUMBERS[dims]}, got {len(value)} numbers: {value!r}")
        result = tuple([_integer(op, argument, v, dims) for v in value]) * (dims // len(value))
    else:
        result = (_integer(op, argument, value, dims),) * dims
    for number in result:
        if number < least:
            raise ValueError(f"{op}: {argument} must be at least {least}, got {value!r}")
    return result


def padding(op: str, value, kernel: tuple[int, ...], stride, dilation) -> tuple[int, ...]:
    """`value`, an int, one for each axis, "same" or "valid", as (top, left, bottom, right), in 3-D with a depth; in
    1-D, where it may be "causal" too, as (left, right)."""
    dims = len(stride)
    if isinstance(value, str):
        if value == "valid":
            return (0,) * (2 * dims)
        if value == "causal" and dims == 1:
            return (dilation[0] * (kernel[0] - 1), 0)
        if value != "same":
            raise ValueError(f'{op}: padding must be {_NUMBERS[dims]}, "same" or "valid", got {value!r}')
        if any(step != 1 for step in stride):
            raise ValueError(f'{op}: padding "same" takes stride 1 only, as in PyTorch, got stride {tuple(stride)}')
        totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        # What does not divide evenly goes to the back, the bottom and the right, as in PyTorch.
        return (*[total // 2 for total in totals], *[total - total // 2 for total in totals])
    return per_axis(op, "padding", value, 0, dims) * 2


def single(op: str, argument: str, value, least: int = 1) -> int:
    """`value`, an int or a sequence of one."""
    if isinstance(value, (tuple, list, torch.Size)):
        if len(value) != 1:
            raise ValueError(f"{op}: {argument} must be an int, got {len(value)} numbers: {value!r}")
        value = value[0]
    return per_axis(op, argument, value, least)[0]


def padding_1d(op: str, value, kernel: int, stride: int, dilation: int) -> tuple[int, int, int, int]:
    """`value`, an int, "same", "valid" or "causal", as (top, left, bottom, right) of the row."""
    if isinstance(value, str):
        if value == "causal":
            return (0, dilation * (kernel - 1), 0, 0)
        if value not in ("same", "valid"):
            raise ValueError(f'{op}: padding must be an int, "same", "valid" or "causal", got {value!r}')
        return padding(op, value, (1, kernel), (1, stride), (1, dilation))
    amount = single(op, "padding", value, 0)
    return (0, amount, 0, amount)


def check_ranks_1d(op: str, tensors: tuple) -> None:
    """That the tensors can be seen as rows; their sizes are checked as those of images with one row."""
    x, dw, pw = tensors[0].shape, tensors[1].shape, tensors[2].shape
    if len(x) not in (2, 3):
        raise ValueError(f"{op}: input must have shape [N, C, L] or [C, L], got {len(x)} dimensions: {list(x)}")
    if len(dw) != 3 or dw[1] != 1:
        raise ValueError(f"{op}: dw_weight must have shape [C * m, 1, k], got {list(dw)}")
    if not (len(pw) == 2 or (len(pw) == 3 and pw[2] == 1)):
        raise ValueError(
            f"{op}: pw_weight must have kernel size 1, of shape [C_out, C * m, 1] or [C_out, C * m], got {list(pw)}"
        )


def check_types(op: str, tensors: tuple) -> None:
    for index, t in enumerate(tensors):
        if not isinstance(t, Tensor) and (t is not None or index < _FIRST_BIAS):
            wanted = "a Tensor" if index < _FIRST_BIAS else "a Tensor or None"
            raise TypeError(f"{op}: {ARGUMENTS[index]} must be {wanted}, got {type(t).__name__}")


def check_operands(op: str, tensors: tuple) -> None:
    """That all are dense floating point tensors of one dtype on one device that has kernels."""
    dtype, device = tensors[0].dtype, tensors[0].device
    for index, t in enumerate(tensors):
        if t is None:
            continue
        known = t.dtype in DTYPES  # quantized tensors have dtypes of their own
        if t.layout is not torch.strided or t.is_nested or (not known and t.is_quantized):
            kind = "nested" if t.is_nested else "quantized" if t.is_quantized else str(t.layout)
            raise TypeError(
                f"{op}: {ARGUMENTS[index]} must be a dense tensor, got a {kind} one; convert it first, for "
                f"example with .to_dense(), .to_padded_tensor() or .dequantize()"
            )
        if not known:
            raise TypeError(
                f"{op}: {ARGUMENTS[index]} must be float64, float32, bfloat16 or float16, got {t.dtype}; convert "
                f"it with .to()"
            )
        if t.dtype != dtype:
            raise TypeError(
                f"{op}: {ARGUMENTS[index]} must have the dtype of input, {dtype}, got {t.dtype}; convert one of "
                f"them with .to(), or use torch.autocast"
            )
        if t.device != device:
            raise RuntimeError(
                f"{op}: {ARGUMENTS[index]} must be on the device of input, {device}, got {t.device}; move it with .to()"
            )
    if device.type not in DEVICES:
        raise RuntimeError(f"{op}: input must be on a CPU or a CUDA device, got {device}; move it with .to()")


def raise_for_no_cuda(op: str, device: torch.device) -> None:
    raise RuntimeError(
        f"{op}: input is on {device}, but the loaded library was built without CUDA kernels; build it again "
        f"where nvcc is found (FORCE_CUDA=1 makes the build say what is missing), or move the tensors with .cpu(); "
        f"`python -m dsconv_cuda.info` shows the build"
    )


_SHAPES = {2: ("H, W", "kh, kw", "1, 1", "1 x 1"), 3: ("D, H, W", "kd, kh, kw", "1, 1, 1", "1 x 1 x 1")}


def check_shapes(op: str, tensors: tuple, dims: int = 2) -> tuple[torch.Size, torch.Size, torch.Size]:
    """That the shapes fit one another. Returns those of input, dw_weight and pw_weight."""
    x, dw, pw = tensors[0].shape, tensors[1].shape, tensors[2].shape
    image, kernel, ones, smallest = _SHAPES[dims]
    if len(x) not in (dims + 1, dims + 2):
        raise ValueError(
            f"{op}: input must have shape [N, C, {image}] or [C, {image}], got {len(x)} dimensions: {list(x)}"
        )
    c_in = x[-1 - dims]
    if c_in == 0:
        raise ValueError(f"{op}: input must have at least one channel, got shape {list(x)}")
    if len(dw) != dims + 2 or dw[1] != 1 or dw[0] == 0 or dw[0] % c_in != 0:
        raise ValueError(
            f"{op}: dw_weight must have shape [C * m, 1, {kernel}] with C={c_in}, the channels of input, and a "
            f"whole m >= 1, got {list(dw)}"
        )
    if 0 in dw[2:]:
        raise ValueError(f"{op}: dw_weight must have a kernel of at least {smallest}, got shape {list(dw)}")
    c_mid = dw[0]
    if not (len(pw) == 2 or (len(pw) == dims + 2 and all(size == 1 for size in pw[2:]))):
        raise ValueError(
            f"{op}: pw_weight must be {smallest.replace(' ', '')}, of shape [C_out, {c_mid}, {ones}] or [C_out, "
            f"{c_mid}], got {list(pw)}; a larger second kernel is no pointwise convolution"
        )
    if pw[1] != c_mid:
        raise ValueError(
            f"{op}: pw_weight must have {c_mid} input channels, as many as dw_weight has filters, got {list(pw)}"
        )
    if pw[0] == 0:
        raise ValueError(f"{op}: pw_weight must have at least one output channel, got shape {list(pw)}")
    for index, size in ((3, c_mid), (4, pw[0])):
        bias = tensors[index]
        if bias is not None and (bias.dim() != 1 or bias.shape[0] != size):
            raise ValueError(f"{op}: {ARGUMENTS[index]} must have shape [{size}], got {list(bias.shape)}")
    return x, dw, pw


def check_extents(op: str, x: torch.Size, dw: torch.Size, pw: torch.Size, stride, padding, dilation) -> list:
    """That the kernel fits into the padded input and that no size overflows. Returns the extents of the output."""
    dims = len(stride)
    # 16 bytes an element, as csrc/geometry.h counts
    largest = 16 * max(dw[0], pw[0]) * (x[0] if len(x) == dims + 2 else 1)
    extents = []
    for axis in range(dims):
        span = dilation[axis] * (dw[2 + axis] - 1) + 1
        padded = x[axis - dims] + padding[axis] + padding[dims + axis]
        if span > padded:
            raise ValueError(
                f"{op}: the kernel is larger than the padded input along the {_AXES[axis - dims]}: "
                f"dilation * (kernel - 1) + 1 = {span}, input + padding = "
                f"{x[axis - dims]} + {padding[axis] + padding[dims + axis]} = {padded}"
            )
        if padded >= _MAX_EXTENT or stride[axis] >= _MAX_EXTENT:
            raise ValueError(
                f"{op}: the sizes along the {_AXES[axis - dims]} overflow 64 bits: padded input {padded}, stride "
                f"{stride[axis]}"
            )
        extents.append((padded - span) // stride[axis] + 1)
        largest *= extents[-1]
    if not torch.compiler.is_compiling() and largest > 2**63 - 1:
        raise ValueError(
            f"{op}: the sizes overflow 64 bits: input {list(x)} with padding {padding[:dims]} and stride {stride} "
            f"makes an output or an intermediate of {largest} bytes"
        )
    return extents
