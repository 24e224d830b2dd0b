"""Depthwise convolution, BatchNorm, activation, pointwise convolution, BatchNorm, activation: as a function.

    z = dw_weight * x + dw_bias                     zhat = (z - mean) * invstd
    a = act(gamma1 * zhat + beta1)
    y = pw_weight . a + pw_bias                     yhat = (y - mean) * invstd
    out = out_act(gamma2 * yhat + beta2)

With statistics of the batch, z is made three times, tile by tile, and written never: for its mean and variance, for y
(with the scale and the shift folded into the depthwise weights), and in backward. A norm with given statistics folds
into the weights beside it; where both are such, the block is a plain depthwise_separable_conv2d.

batchnorm_autograd.py joins the ops, batchnorm_graph.py makes one op of it for torch.compile, sequence.py joins blocks;
modules take the shorter way of batchnorm_training.py where a call is plain.
"""

import dataclasses
import functools

import torch
from torch import Tensor, nn

from dsconv_cuda import _checks, _loader, autograd, batchnorm_graph, gated
from dsconv_cuda.activations import activation_number
from dsconv_cuda.batchnorm_autograd import Batch, BatchNormBlock, Block, norm_later, norm_now, operation
from dsconv_cuda.deferred import Deferred
from dsconv_cuda.functional import _fast, _load, as_rows, cast_for_autocast
from dsconv_cuda.norms import BatchNormArguments, check_norm, fold_norm, product, track, wide_parameter
from dsconv_cuda.ops import IDENTITY
from dsconv_cuda.second_order import Config


def depthwise_separable_conv_bn2d(
    input: Tensor,
    dw_weight: Tensor,
    pw_weight: Tensor,
    dw_bias: Tensor | None = None,
    pw_bias: Tensor | None = None,
    bn1: BatchNormArguments | None = None,
    bn2: BatchNormArguments | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    activation: str | nn.Module | None = "relu",
    out_activation: str | nn.Module | None = "relu",
    *,
    recompute_output: bool = False,
) -> Tensor:
    r"""Depthwise convolution, BatchNorm, activation, pointwise convolution, BatchNorm, activation, trained as one.

    Equivalent to::

        z = F.conv2d(input, dw_weight, dw_bias, stride, padding, dilation, groups=input.shape[1])
        a = activation(F.batch_norm(z, *bn1))
        y = F.conv2d(a, pw_weight, pw_bias)
        return out_activation(F.batch_norm(y, *bn2))

    but of all this only y and the result are ever written to memory. The block is that of MobileNetV1
    (arXiv:1704.04861, figure 3); the norm is that of arXiv:1502.03167.

    Args:
        input: ``[N, C, H, W]``.
        dw_weight, pw_weight, dw_bias, pw_bias, stride, padding, dilation, activation, out_activation: as in
            :func:`dsconv_cuda.depthwise_separable_conv2d`.
        bn1, bn2: the norms after the depthwise and after the pointwise part; None for no norm. Their tensors have the
            dtype of input, or float32 beside float16 and bfloat16. Running statistics are changed in place.
        recompute_output: y is computed again in backward instead of being kept for it.

    Saved for backward are the input, the weights, float64 vectors of the channels, and y before its norm; with
    recompute_output not even that. Where no norm takes statistics of the batch, it is what
    :func:`dsconv_cuda.depthwise_separable_conv2d` saves.

    Statistics are sums of squares about the mean (tiles merged by Chan's formula in float64), never E[z^2] - E[z]^2.
    Deterministic as :func:`dsconv_cuda.depthwise_separable_conv2d` is. The gradient of a bias before a norm that takes
    statistics of the batch is zero, which PyTorch computes up to rounding.

    Double backward, forward-mode AD and torch.func transforms are refused where a norm takes statistics of the batch.

    Returns:
        ``[N, C_out, H_out, W_out]``, in the memory format that PyTorch's two convolutions would give.

    Raises:
        TypeError, ValueError, RuntimeError, ImportError: as :func:`dsconv_cuda.depthwise_separable_conv2d` does.
        ValueError: a norm that takes statistics of the batch and gets one value per channel, as in PyTorch.
        RuntimeError: CUDA tensors where a norm takes statistics of the batch and this build has no kernels for that.
    """
    tensors = (input, dw_weight, pw_weight, dw_bias, pw_bias)
    geometry = (stride, padding, dilation)
    return block_of_chain(
        2, *tensors, bn1, bn2, *geometry, activation, out_activation, recompute_output=recompute_output
    )


def depthwise_separable_conv_bn1d(
    input: Tensor,
    dw_weight: Tensor,
    pw_weight: Tensor,
    dw_bias: Tensor | None = None,
    pw_bias: Tensor | None = None,
    bn1: BatchNormArguments | None = None,
    bn2: BatchNormArguments | None = None,
    stride: int | tuple[int] = 1,
    padding: int | tuple[int] | str = 0,
    dilation: int | tuple[int] = 1,
    activation: str | nn.Module | None = "relu",
    out_activation: str | nn.Module | None = "relu",
    *,
    recompute_output: bool = False,
) -> Tensor:
    """:func:`depthwise_separable_conv_bn2d` of images with one row, by the same kernels and without a copy: ``[N, C,
    L]`` to ``[N, C_out, L_out]``.

    Weights, stride, padding (so ``"causal"`` too) and dilation are as in
    :func:`dsconv_cuda.depthwise_separable_conv1d`, everything else as in 2-D.
    """
    tensors = (input, dw_weight, pw_weight, dw_bias, pw_bias)
    geometry = (stride, padding, dilation)
    return block_of_chain(
        1, *tensors, bn1, bn2, *geometry, activation, out_activation, recompute_output=recompute_output
    )


def depthwise_separable_conv_bn3d(
    input: Tensor,
    dw_weight: Tensor,
    pw_weight: Tensor,
    dw_bias: Tensor | None = None,
    pw_bias: Tensor | None = None,
    bn1: BatchNormArguments | None = None,
    bn2: BatchNormArguments | None = None,
    stride: int | tuple[int, int, int] = 1,
    padding: int | tuple[int, int, int] | str = 0,
    dilation: int | tuple[int, int, int] = 1,
    activation: str | nn.Module | None = "relu",
    out_activation: str | nn.Module | None = "relu",
    *,
    recompute_output: bool = False,
) -> Tensor:
    """:func:`depthwise_separable_conv_bn2d` with a depth: ``[N, C, D, H, W]`` to ``[N, C_out, D_out, H_out, W_out]``.

    Weights, stride, padding and dilation are as in :func:`dsconv_cuda.depthwise_separable_conv3d`, everything else as
    in 2-D.
    """
    tensors = (input, dw_weight, pw_weight, dw_bias, pw_bias)
    geometry = (stride, padding, dilation)
    return block_of_chain(
        3, *tensors, bn1, bn2, *geometry, activation, out_activation, recompute_output=recompute_output
    )


@dataclasses.dataclass
class Unnormalised:
    """What a block of a chain hands to the next: out_act(gamma * yhat + beta) of `y`, which that one makes as it reads.

    `vectors` are those of ``torch.ops.dsconv_cuda.norm_vectors``, `act` is the number of the activation. What
    comes back to `y` as its gradient, or to the Deferred that `y` was taken from, is that of the value it stands for.
    """

    y: Tensor
    vectors: Tensor
    act: int
    deferred: Deferred | None = None


def norm_before(dims: int, y: Tensor, bn: BatchNormArguments, activation: str, owner) -> "Unnormalised | Deferred":
    """activation(F.batch_norm(y, *bn)) with statistics of the batch, of which nothing is computed but these.

    A Deferred; in graphs of torch.compile, which hold no such tensors, what block_of_chain() takes.
    """
    op, pixels = operation(dims), [y.shape[0], *y.shape[2:]]
    check_norm(op, "the norm before the depthwise convolution", bn, y, y.shape[1], pixels)
    act = activation_number(activation, "activation", op)
    count = product(pixels)
    batch = _of_batch(bn, count)
    tensors = (y, wide_parameter(bn.weight), wide_parameter(bn.bias))
    if not _in_graph():
        return norm_later(*tensors, op, batch, act, owner)[0]
    y, vectors, moments = torch.ops.dsconv_cuda.norm_later(*tensors, bn.eps, act)
    with torch.no_grad():
        batch.track(moments, count)
    return Unnormalised(y, vectors, act)


def block_of_chain(
    dims: int,
    input: Tensor | Unnormalised,
    dw_weight: Tensor,
    pw_weight: Tensor,
    dw_bias: Tensor | None,
    pw_bias: Tensor | None,
    bn1: BatchNormArguments | None,
    bn2: BatchNormArguments | None,
    stride,
    padding,
    dilation,
    activation,
    out_activation,
    *,
    recompute_output: bool = False,
    defer: bool = False,
    gate: gated.Gate | None = None,
) -> Tensor | Unnormalised:
    """:func:`depthwise_separable_conv_bn2d`, or that of another `dims`, in a chain: after a block that deferred its
    second norm, where `input` is Unnormalised, and before one that takes it, with `defer` (bn2 must take statistics of
    the batch then). Or, before no other, with a `gate` between the activation and the pointwise part (gated.py).
    """
    op = operation(dims)
    before = input if isinstance(input, Unnormalised) else None
    tensors = (before.y if before else input, dw_weight, pw_weight, dw_bias, pw_bias)
    _checks.check_types(op, tensors)
    if tensors[0].dim() != dims + 2:
        image = ", ".join(_IMAGES[dims])
        shape = list(tensors[0].shape)
        raise ValueError(f"{op}: input must have shape [N, C, {image}], as nn.BatchNorm{dims}d takes, got {shape}")
    axes = max(dims, 2)  # of the kernels
    if dims == 1:
        tensors, stride, padding, dilation = as_rows(op, tensors, stride, padding, dilation)
    device, given = tensors[0].device.type, tensors
    tensors = cast_for_autocast(tensors)
    _checks.check_operands(op, tensors)
    x_shape, dw_shape, pw_shape = _checks.check_shapes(op, tensors, axes)
    stride = _checks.per_axis(op, "stride", stride, 1, axes)
    dilation = _checks.per_axis(op, "dilation", dilation, 1, axes)
    if dims > 1:
        padding = _checks.padding(op, padding, dw_shape[2:], stride, dilation)
    extents = _checks.check_extents(op, x_shape, dw_shape, pw_shape, stride, padding, dilation)
    act = activation_number(activation, "activation", op)
    out_act = activation_number(out_activation, "out_activation", op)
    pixels = [x_shape[0], *extents[-dims:]]

    x, dw_weight, pw_weight, dw_bias, pw_bias = tensors
    check_norm(op, "bn1", bn1, x, dw_shape[0], pixels)
    check_norm(op, "bn2", bn2, x, pw_shape[0], pixels)
    _load()
    if device == "cuda" and not _loader.cuda_kernels_loaded():
        _checks.raise_for_no_cuda(op, tensors[0].device)
    batch1, batch2 = bn1 is not None and bn1.training, bn2 is not None and bn2.training
    # Before autocast rounds them.
    if bn1 is not None and not batch1:
        dw_weight, dw_bias = (t.to(x.dtype) for t in fold_norm(given[1], given[3], bn1))
    if bn2 is not None and not batch2:
        pw_weight, pw_bias = (t.to(x.dtype) for t in fold_norm(given[2], given[4], bn2))
    if before is not None and before.deferred is not None:
        x = before.deferred
    tensors = (x, dw_weight, pw_weight, dw_bias, pw_bias)
    if gate is None and not batch1 and not batch2 and before is None:
        y = autograd.apply(*tensors, Config(stride, padding, dilation, act, out_act, _fast(x)))
        return y.squeeze(-2) if dims == 1 else y

    count = product(pixels)
    norms = [_of_batch(bn, count) if batch else None for bn, batch in ((bn1, batch1), (bn2, batch2))]
    affine = [
        wide_parameter(t)
        for bn, batch in ((bn1, batch1), (bn2, batch2))
        for t in ((bn.weight, bn.bias) if batch else (None, None))
    ]
    if gate is not None:
        _check_gate(op, x.device)
        config = Config(stride, padding, dilation, act, IDENTITY if batch2 else out_act)
        call = gated.Call(op, dims, config, (x_shape[0], pw_shape[0], *extents), norms[0], batch2)
        in_vectors = None
        if before is not None:
            in_vectors, call.in_act = before.vectors, before.act
        y = gated.apply(tensors, tuple(affine[:2]), call, gate, in_vectors)
        if batch2:
            y = norm_now(y, *affine[2:], op, norms[1], out_act)
        return y.squeeze(-2) if dims == 1 else y

    _refuse_what_has_no_rule(op)
    _check_kernels(op, x.device)
    config, in_act = Config(stride, padding, dilation, act, IDENTITY, _fast(x)), before.act if before else IDENTITY
    block = Block(op, config, out_act, *norms, recompute_output, in_act, defer)
    in_vectors = before.vectors if before else None
    if _in_graph() and not _shared(block):
        out, vectors, *moments = batchnorm_graph.apply((*tensors, *affine, in_vectors), block)
        with torch.no_grad():
            for batch, of_batch in zip((block.batch1, block.batch2), moments, strict=True):
                if batch is not None:
                    batch.track(of_batch, count)
    else:
        out, vectors = BatchNormBlock.apply(*tensors, *affine, in_vectors, block)[:2]
    out = out.squeeze(-2) if dims == 1 else out
    return Unnormalised(out, vectors, out_act) if defer else out


def _of_batch(bn: BatchNormArguments, count: int) -> Batch:
    return Batch(bn.eps, count, bn.process_group, functools.partial(track, bn))


# ---- arguments -------------------------------------------------------------------------------------------------------


_IMAGES = {1: "L", 2: "HW", 3: "DHW"}


_devices_with_kernels = {"meta"}


def _check_kernels(op: str, device: torch.device) -> None:
    if device.type in _devices_with_kernels:
        return
    if not _loader.batch_norm_kernels_loaded(device.type):
        raise RuntimeError(
            f"{op}: this build has no kernels on {device.type} for a norm that takes statistics of the batch; train "
            f"on the CPU, or with nn.Conv2d and nn.BatchNorm2d under the same names (the state_dict fits), or freeze "
            f"the norms with .eval()"
        )
    _devices_with_kernels.add(device.type)


_check_kernels._dynamo_marked_constant = True  # as functional._load


def _check_gate(op: str, device: torch.device) -> None:
    what = None
    if device.type not in ("cpu", "meta") or not gated.kernels_loaded():
        what = f"has no kernels on {device.type}"
    elif gated.refused_in_graph():
        what = "is not supported in graphs of torch.export and torch.jit, nor with gradients in those of torch.compile"
    elif torch._C._are_functorch_transforms_active():
        what = "is not supported under torch.func transforms"
    if what is not None:
        raise RuntimeError(f"{op}: a gate, as of squeeze-excite, {what}; use the modules one by one there")


def _refuse_what_has_no_rule(op: str) -> None:
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            f"{op}: torch.func transforms are not supported where a norm takes statistics of the batch; put the "
            f"norms into eval mode, or use torch.autograd"
        )


def _in_graph() -> bool:
    return torch.compiler.is_dynamo_compiling() or torch._C._get_tracing_state() is not None


def _shared(block: Block) -> bool:
    return any(batch is not None and batch.is_shared() for batch in (block.batch1, block.batch2))
