"""The op as a function: defaults, argument checks, autocast."""

import torch
from torch import Tensor, nn

from dsconv_cuda import _checks, _loader, autograd, flops
from dsconv_cuda.activations import activation_number
from dsconv_cuda.second_order import Config

_OP = "depthwise_separable_conv2d"
_AUTOCAST_DEVICES = ("cpu", "cuda")
_AUTOCAST_FROM = (torch.float32, torch.float16, torch.bfloat16)


def _load() -> None:
    _loader.load_library()
    flops.register_in_modes()


# What torch.compiler.assume_constant_result() sets, without its import of the compiler: a traced call loads the library
# while it is traced.
_load._dynamo_marked_constant = True


def depthwise_separable_conv2d(
    input: Tensor,
    dw_weight: Tensor,
    pw_weight: Tensor,
    dw_bias: Tensor | None = None,
    pw_bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    activation: str | nn.Module | None = "identity",
    out_activation: str | nn.Module | None = "identity",
) -> Tensor:
    r"""Depthwise convolution, activation, pointwise (1x1) convolution and activation, as one operation.

    Equivalent to::

        z = F.conv2d(input, dw_weight, dw_bias, stride, padding, dilation, groups=input.shape[-3])
        y = out_activation(F.conv2d(activation(z), pw_weight, pw_bias))

    but z is never written to memory, neither here nor for backward, which computes it again. This is the depthwise
    separable convolution of MobileNetV1 (arXiv:1704.04861, section 3.1), there with ReLU after both parts, and of
    Xception (arXiv:1610.02357, section 2), there with nothing between the two.

    Args:
        input: ``[N, C, H, W]``, N may be 0; or unbatched, ``[C, H, W]``.
        dw_weight: ``[C * m, 1, kh, kw]``, one filter per channel, m filters with a channel multiplier of m.
        pw_weight: ``[C_out, C * m, 1, 1]`` or ``[C_out, C * m]``.
        dw_bias: ``[C * m]``, or None.
        pw_bias: ``[C_out]``, or None.
        stride, dilation: an int or a pair (vertical, horizontal), of the depthwise part.
        padding: zeros around the input: an int, a pair, ``"valid"`` (none) or ``"same"`` (the output has the size of
            the input; stride 1 only; an even kernel's odd row and column go to the bottom and the right).
        activation, out_activation: ``identity``, ``relu``, ``relu6``, ``leaky_relu`` (slope 0.01), ``silu``,
            ``hardswish``, ``gelu``, ``gelu_tanh``, ``sigmoid``, ``tanh`` or ``hardsigmoid``; None means identity, and
            so does ``"none"``; an instance of the matching ``torch.nn`` module is accepted.

    All tensors have one dtype, float64, float32, bfloat16 or float16, and one device, a CPU or a CUDA one. float16,
    bfloat16 and float32 accumulate in float32, float64 in float64. On CUDA the pointwise part of a float32 call rounds
    its operands to TF32 where PyTorch's own convolutions do (``torch.backends.cudnn.conv.fp32_precision``, or
    ``allow_tf32``); the depthwise part never does. Under ``torch.autocast`` the operands are cast as
    those of PyTorch's convolutions are; float64 stays float64.

    Any strides are read as they lie: NCHW, channels_last, slices and expanded tensors, with no copy where either
    channels or columns are adjacent in memory.

    Saved for backward are the input, the weights and the biases; with an out_activation also the output, or the value
    before out_activation where the derivative needs that (silu, hardswish, gelu, gelu_tanh, hardsigmoid). First
    derivatives run fused kernels, and only those that are asked for; double backward and forward-mode AD are right and
    compose stock convolutions.

    Under ``torch.func.vmap`` a batch of inputs is one call, nested too, and so are the gradients of a batch of inputs;
    a batch of weights, or of their gradients, is a call for each element.

    Deterministic: equal calls give equal bits, on the CPU for every number of threads too.

    Returns:
        ``[N, C_out, H_out, W_out]`` (``[C_out, H_out, W_out]`` for an unbatched input), in the memory format that
        PyTorch's two convolutions would give, channels_last if input or a weight is.

    Raises:
        TypeError: an argument of a wrong type, mixed dtypes, or integer, complex, sparse, nested or quantized tensors.
        ValueError: shapes that do not fit, a pw_weight that is not 1x1, stride or dilation below 1, negative padding,
            a kernel larger than the padded input, an unknown activation, sizes that overflow.
        RuntimeError: mixed or unsupported devices, CUDA tensors where the library was built without CUDA.
        ImportError: the compiled library is missing and cannot be built; the text says what was tried and what to do.
    """
    tensors = (input, dw_weight, pw_weight, dw_bias, pw_bias)
    _checks.check_types(_OP, tensors)
    return _conv(_OP, tensors, stride, padding, dilation, activation, out_activation)


def _conv(
    op: str, tensors: tuple, stride, padding, dilation, activation, out_activation, border=None, dims: int = 2
) -> Tensor:
    """`border` is the padding worked out already, as (top, left, bottom, right)."""
    device = tensors[0].device.type
    tensors = cast_for_autocast(tensors)
    _checks.check_operands(op, tensors)
    x_shape, dw_shape, pw_shape = _checks.check_shapes(op, tensors, dims)

    stride = _checks.per_axis(op, "stride", stride, 1, dims)
    dilation = _checks.per_axis(op, "dilation", dilation, 1, dims)
    padding = border or _checks.padding(op, padding, dw_shape[2:], stride, dilation)
    _checks.check_extents(op, x_shape, dw_shape, pw_shape, stride, padding, dilation)
    config = Config(
        stride,
        padding,
        dilation,
        activation_number(activation, "activation", op),
        activation_number(out_activation, "out_activation", op),
        _fast(tensors[0]),
    )

    _load()
    if device == "cuda" and not _loader.cuda_kernels_loaded():
        _checks.raise_for_no_cuda(op, tensors[0].device)
    if len(x_shape) == dims + 2:
        return autograd.apply(*tensors, config)
    return autograd.apply(tensors[0].unsqueeze(0), *tensors[1:], config).squeeze(0)


def _fast(x: Tensor) -> bool:
    """The ops' argument: for float32 on CUDA the switch that PyTorch's own convolutions follow.

    For other types whether products may be those of cuBLAS, which raises in deterministic mode where
    CUBLAS_WORKSPACE_CONFIG is not set; convolutions do not.
    """
    if x.device.type != "cuda":
        return False
    if x.dtype != torch.float32:
        return not torch.are_deterministic_algorithms_enabled()
    cudnn = torch.backends.cudnn
    if hasattr(cudnn, "conv"):  # torch >= 2.9; allow_tf32 is another view of it, and raises where it cannot say
        return cudnn.conv.fp32_precision == "tf32"
    return cudnn.allow_tf32


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast casts `x` and the weights beside it to; None where it does not."""
    if x.dtype not in _AUTOCAST_FROM or not _autocasts(x.device.type):
        return None
    return torch.get_autocast_dtype(x.device.type)


def _autocasts(device: str) -> bool:
    return device in _AUTOCAST_DEVICES and torch.is_autocast_enabled(device)


def cast_for_autocast(tensors: tuple) -> tuple:
    """Casts what PyTorch's autocast, where it is on for the device of the first, casts for a convolution: floating
    point tensors of the device, but not float64."""
    device = tensors[0].device.type
    if not _autocasts(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype) if t is not None and t.dtype in _AUTOCAST_FROM and t.device.type == device else t for t in tensors
    )


_OP_1D = "depthwise_separable_conv1d"


def depthwise_separable_conv1d(
    input: Tensor,
    dw_weight: Tensor,
    pw_weight: Tensor,
    dw_bias: Tensor | None = None,
    pw_bias: Tensor | None = None,
    stride: int | tuple[int] = 1,
    padding: int | tuple[int] | str = 0,
    dilation: int | tuple[int] = 1,
    activation: str | nn.Module | None = "identity",
    out_activation: str | nn.Module | None = "identity",
) -> Tensor:
    r"""Depthwise convolution, activation, pointwise convolution and activation along one dimension, as one operation.

    :func:`depthwise_separable_conv2d` of an image with one row, by the same kernels and without a copy.

    Args:
        input: ``[N, C, L]``, N may be 0; or unbatched, ``[C, L]``.
        dw_weight: ``[C * m, 1, k]``.
        pw_weight: ``[C_out, C * m, 1]`` or ``[C_out, C * m]``.
        stride, dilation: an int.
        padding: an int, ``"same"``, ``"valid"``, or ``"causal"``: ``dilation * (k - 1)`` zeros on the left and none on
            the right, so that no output sees what comes after it. With stride 1 the length is kept.
        dw_bias, pw_bias, activation, out_activation: as in :func:`depthwise_separable_conv2d`.

    Returns:
        ``[N, C_out, L_out]``, or ``[C_out, L_out]`` for an unbatched input.

    Raises:
        As :func:`depthwise_separable_conv2d`.
    """
    tensors = (input, dw_weight, pw_weight, dw_bias, pw_bias)
    _checks.check_types(_OP_1D, tensors)
    tensors, stride, border, dilation = as_rows(_OP_1D, tensors, stride, padding, dilation)
    return _conv(_OP_1D, tensors, stride, 0, dilation, activation, out_activation, border).squeeze(-2)


def as_rows(op: str, tensors: tuple, stride, padding, dilation) -> tuple[tuple, tuple, tuple, tuple]:
    """The arguments of a call in one dimension as those of images with one row, padding as (top, left, bottom,
    right)."""
    _checks.check_ranks_1d(op, tensors)
    input, dw_weight, pw_weight, *biases = tensors
    stride, dilation = (_checks.single(op, name, v) for name, v in (("stride", stride), ("dilation", dilation)))
    border = _checks.padding_1d(op, padding, dw_weight.shape[2], stride, dilation)
    pw_weight = pw_weight.unsqueeze(-1) if pw_weight.dim() == 3 else pw_weight
    return (input.unsqueeze(-2), dw_weight.unsqueeze(-2), pw_weight, *biases), (1, stride), border, (1, dilation)


_OP_3D = "depthwise_separable_conv3d"


def depthwise_separable_conv3d(
    input: Tensor,
    dw_weight: Tensor,
    pw_weight: Tensor,
    dw_bias: Tensor | None = None,
    pw_bias: Tensor | None = None,
    stride: int | tuple[int, int, int] = 1,
    padding: int | tuple[int, int, int] | str = 0,
    dilation: int | tuple[int, int, int] = 1,
    activation: str | nn.Module | None = "identity",
    out_activation: str | nn.Module | None = "identity",
) -> Tensor:
    r"""Depthwise convolution, activation, pointwise convolution and activation in three dimensions, as one operation.

    Equivalent to::

        z = F.conv3d(input, dw_weight, dw_bias, stride, padding, dilation, groups=input.shape[-4])
        y = out_activation(F.conv3d(activation(z), pw_weight, pw_bias))

    :func:`depthwise_separable_conv2d` with a depth, by the same kernels: z is never written to memory.

    Args:
        input: ``[N, C, D, H, W]``, N may be 0; or unbatched, ``[C, D, H, W]``.
        dw_weight: ``[C * m, 1, kd, kh, kw]``.
        pw_weight: ``[C_out, C * m, 1, 1, 1]`` or ``[C_out, C * m]``.
        stride, dilation: an int or three (depth, vertical, horizontal).
        padding: zeros around the input: an int, three, ``"valid"`` or ``"same"``.
        dw_bias, pw_bias, activation, out_activation: as in :func:`depthwise_separable_conv2d`.

    dtypes, devices, strides, what is saved for backward, derivatives and determinism are as there, with
    channels_last_3d for channels_last.

    Returns:
        ``[N, C_out, D_out, H_out, W_out]`` (``[C_out, D_out, H_out, W_out]`` for an unbatched input), channels_last_3d
        if input or a weight is.

    Raises:
        As :func:`depthwise_separable_conv2d`.
    """
    tensors = (input, dw_weight, pw_weight, dw_bias, pw_bias)
    _checks.check_types(_OP_3D, tensors)
    return _conv(_OP_3D, tensors, stride, padding, dilation, activation, out_activation, dims=3)
