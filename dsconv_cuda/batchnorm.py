"""Depthwise convolution, BatchNorm, activation, pointwise convolution, BatchNorm, activation: as a function.

    z = dw_weight * x + dw_bias                     zhat = (z - mean) * invstd
    a = act(gamma1 * zhat + beta1)
    y = pw_weight . a + pw_bias                     yhat = (y - mean) * invstd
    out = out_act(gamma2 * yhat + beta2)

With statistics of the batch, z is made three times, tile by tile, and written never: for its mean and variance, for y
(with the scale and the shift folded into the depthwise weights), and in backward. A norm with given statistics folds
into the weights beside it; where both are such, the block is a plain depthwise_separable_conv2d.

The steps are ops of their own (csrc/op_cpu_norm.cpp), so that statistics can be reduced over processes between them:

    forward     z_moments -> fwd_norm -> moments -> norm_act
    backward    norm_act_sums -> bwd_norm, or bwd_norm_pointwise -> bwd_norm_depthwise

Per-channel values go between them in float64.
"""

import dataclasses

import torch
from torch import Tensor, nn

from dsconv_cuda import _checks, _loader, autograd
from dsconv_cuda.activations import activation_number
from dsconv_cuda.functional import _AUTOCAST_DEVICES, _autocast, _load, _tf32_applies
from dsconv_cuda.ops import IDENTITY, grad_mask
from dsconv_cuda.second_order import Config

_OP = "depthwise_separable_conv_bn2d"


@dataclasses.dataclass
class BatchNormArguments:
    """What ``F.batch_norm`` takes beside its input, with its meaning, and a process group.

    ``training`` takes the statistics of the batch, and moves ``running_mean`` and ``running_var``, where there are any,
    by ``momentum`` towards them; otherwise the running ones are used. With a ``process_group`` the statistics of the
    batch are those of all processes of the group, as in ``nn.SyncBatchNorm``.
    """

    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    training: bool = False
    momentum: float = 0.1
    eps: float = 1e-5
    process_group: object | None = None


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
    _checks.check_types(_OP, tensors)
    device = input.device.type
    if device in _AUTOCAST_DEVICES and torch.is_autocast_enabled(device):
        tensors = _autocast(tensors, device)
    _checks.check_operands(_OP, tensors)
    x_shape, dw_shape, pw_shape = _checks.check_shapes(_OP, tensors)
    if len(x_shape) != 4:
        raise ValueError(f"{_OP}: input must have shape [N, C, H, W], as nn.BatchNorm2d takes, got {list(x_shape)}")
    stride = _checks.pair(_OP, "stride", stride, 1)
    dilation = _checks.pair(_OP, "dilation", dilation, 1)
    padding = _checks.padding(_OP, padding, dw_shape[2:], stride, dilation)
    _checks.check_extents(_OP, x_shape, dw_shape, pw_shape, stride, padding, dilation)
    act = activation_number(activation, "activation", _OP)
    out_act = activation_number(out_activation, "out_activation", _OP)
    pixels = [x_shape[0]]
    for axis in (0, 1):
        padded = x_shape[2 + axis] + padding[axis] + padding[2 + axis]
        pixels.append((padded - dilation[axis] * (dw_shape[2 + axis] - 1) - 1) // stride[axis] + 1)

    x, dw_weight, pw_weight, dw_bias, pw_bias = tensors
    _check_norm("bn1", bn1, x, dw_shape[0], pixels)
    _check_norm("bn2", bn2, x, pw_shape[0], pixels)
    _load()
    if device == "cuda" and not _loader.cuda_kernels_loaded():
        _checks.raise_for_no_cuda(_OP, input.device)
    batch1, batch2 = bn1 is not None and bn1.training, bn2 is not None and bn2.training
    if bn1 is not None and not batch1:
        dw_weight, dw_bias = fold_norm(dw_weight, dw_bias, bn1)
    if bn2 is not None and not batch2:
        pw_weight, pw_bias = fold_norm(pw_weight, pw_bias, bn2)
    tensors = (x, dw_weight, pw_weight, dw_bias, pw_bias)
    if not batch1 and not batch2:
        return autograd.apply(*tensors, Config(stride, padding, dilation, act, out_act, _tf32_applies(x)))

    _refuse_what_has_no_rule()
    _check_kernels(input.device)
    count = pixels[0] * pixels[1] * pixels[2]
    block = Block(
        Config(stride, padding, dilation, act, IDENTITY, _tf32_applies(x)),
        out_act,
        _Batch(bn1.eps, count, bn1.process_group) if batch1 else None,
        _Batch(bn2.eps, count, bn2.process_group) if batch2 else None,
        recompute_output,
    )
    affine = [
        _parameter(t, x)
        for bn, batch in ((bn1, batch1), (bn2, batch2))
        for t in ((bn.weight, bn.bias) if batch else (None, None))
    ]
    out, moments1, count1, moments2, count2 = BatchNormBlock.apply(*tensors, *affine, block)
    with torch.no_grad():
        if batch1:
            _track(bn1, moments1, count1)
        if batch2:
            _track(bn2, moments2, count2)
    return out


# ---- arguments -------------------------------------------------------------------------------------------------------


def _check_norm(name: str, bn: BatchNormArguments | None, x: Tensor, channels: int, pixels: list) -> None:
    if bn is None:
        return
    if not isinstance(bn, BatchNormArguments):
        raise TypeError(f"{_OP}: {name} must be a BatchNormArguments or None, got {type(bn).__name__}")
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    for argument in ("running_mean", "running_var", "weight", "bias"):
        t = getattr(bn, argument)
        if t is None:
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{_OP}: {name}.{argument} must be a Tensor or None, got {type(t).__name__}")
        if t.dim() != 1 or t.shape[0] != channels:
            raise ValueError(f"{_OP}: {name}.{argument} must have shape [{channels}], got {list(t.shape)}")
        if t.dtype not in (x.dtype, wide):
            raise TypeError(
                f"{_OP}: {name}.{argument} must have the dtype of input, {x.dtype}, or {wide}, got {t.dtype}; convert "
                f"one of them with .to()"
            )
        if t.device != x.device:
            raise RuntimeError(f"{_OP}: {name}.{argument} must be on the device of input, {x.device}, got {t.device}")
    if not bn.training:
        if bn.running_mean is None or bn.running_var is None:
            raise ValueError(f"{_OP}: {name} needs running_mean and running_var where training is False")
        if bn.eps < 0:
            raise ValueError(f"batch_norm eps must be non-negative, but got {bn.eps}")
        return
    if pixels[0] * pixels[1] * pixels[2] == 1 and (bn.process_group is None or bn.process_group.size() == 1):
        size = torch.Size((pixels[0], channels, *pixels[1:]))
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {size}")
    if bn.eps <= 0:
        raise ValueError(f"batch_norm eps must be positive during training, but got {bn.eps}")


def _parameter(t: Tensor | None, x: Tensor) -> Tensor | None:
    """A parameter of a norm in the compute type."""
    return t.float() if t is not None and t.dtype in (torch.float16, torch.bfloat16) else t


def fold_norm(weight: Tensor, bias: Tensor | None, bn: BatchNormArguments) -> tuple[Tensor, Tensor]:
    """The weight and the bias of a convolution with the norm after it, differentiable in all.

    Scale and shift, a number a channel, are made in float64 and rounded once.
    """
    mean, var, gamma, beta = (
        None if t is None else t.double() for t in (bn.running_mean, bn.running_var, bn.weight, bn.bias)
    )
    scale = torch.rsqrt(var + bn.eps)
    if gamma is not None:
        scale = scale * gamma
    shift = (-mean if bias is None else bias.double() - mean) * scale
    if beta is not None:
        shift = shift + beta
    wide = torch.promote_types(weight.dtype, torch.float32)
    scaled = weight.to(wide) * scale.to(wide).view(-1, *(1,) * (weight.dim() - 1))
    return scaled.to(weight.dtype), shift.to(weight.dtype)


_devices_with_kernels = {"meta"}


def _check_kernels(device: torch.device) -> None:
    if device.type in _devices_with_kernels:
        return
    if not _loader.batch_norm_kernels_loaded(device.type):
        raise RuntimeError(
            f"{_OP}: this build has no kernels on {device.type} for a norm that takes statistics of the batch; train "
            f"on the CPU, or with nn.Conv2d and nn.BatchNorm2d under the same names (the state_dict fits), or freeze "
            f"the norms with .eval()"
        )
    _devices_with_kernels.add(device.type)


def _refuse_what_has_no_rule() -> None:
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            f"{_OP}: torch.func transforms are not supported where a norm takes statistics of the batch; put the "
            f"norms into eval mode, or use torch.autograd"
        )


# ---- statistics ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Batch:
    """A norm that takes statistics of the batch: of `count` values a channel here, and of what `group` has beside."""

    eps: float
    count: int
    group: object | None

    def is_shared(self) -> bool:
        return self.group is not None and self.group.size() > 1

    def join_moments(self, moments: Tensor) -> tuple[Tensor, float]:
        """The mean and variance over all processes, from everybody's, and the number of values; in order of ranks."""
        if not self.is_shared():
            return moments, float(self.count)
        mine = torch.cat((moments, moments.new_full((1, moments.shape[1]), float(self.count))))
        everybody = [torch.empty_like(mine) for _ in range(self.group.size())]
        torch.distributed.all_gather(everybody, mine, group=self.group)
        means, variances, counts = torch.stack(everybody).unbind(1)
        count = counts.sum(0)
        mean = (means * counts).sum(0) / count
        variance = ((variances + (means - mean).square()) * counts).sum(0) / count
        return torch.stack((mean, variance)), count[0].item()

    def join_sums(self, sums: Tensor) -> Tensor:
        if not self.is_shared():
            return sums
        sums = sums.clone()
        torch.distributed.all_reduce(sums, group=self.group)
        return sums


def _track(bn: BatchNormArguments, moments: Tensor, count: float) -> None:
    """Moves the running statistics towards those of the batch; the variance without bias, as PyTorch does."""
    if count == 0:  # an empty batch
        return
    for running, row, scale in ((bn.running_mean, 0, 1.0), (bn.running_var, 1, count / (count - 1))):
        if running is not None:
            value = moments[row] if scale == 1.0 else moments[row] * scale
            running.lerp_(value.to(running.dtype), bn.momentum)


# ---- the block as a differentiable function --------------------------------------------------------------------------


@dataclasses.dataclass
class Block:
    """The arguments of a block that are no tensors; batch1 and batch2 are None for no norm."""

    config: Config
    out_act: int
    batch1: _Batch | None
    batch2: _Batch | None
    recompute: bool


def _vectors_of_no_norm(y: Tensor) -> Tensor:
    vectors = torch.zeros(4, y.shape[1], dtype=torch.float64, device=y.device)
    vectors[1:3] = 1
    return vectors


def _make_y(x, dw_weight, pw_weight, dw_bias, pw_bias, vectors1, config: Config) -> Tensor:
    ops = torch.ops.dsconv_cuda
    if vectors1 is None:
        return ops.fwd(x, dw_weight, pw_weight, dw_bias, pw_bias, *config.arguments(), *config.precision())
    arguments = (*config.arguments()[:4], *config.precision())
    return ops.fwd_norm(x, dw_weight, pw_weight, dw_bias, pw_bias, vectors1, *arguments)


class BatchNormBlock(torch.autograd.Function):
    """(out, moments and count of the first norm, those of the second); only out has a gradient."""

    @staticmethod
    def forward(ctx, x, dw_weight, pw_weight, dw_bias, pw_bias, gamma1, beta1, gamma2, beta2, block: Block):
        ops, config = torch.ops.dsconv_cuda, block.config
        vectors1 = vectors2 = moments1 = moments2 = None
        count1 = count2 = 0.0
        with torch._C._AutoDispatchBelowAutograd():
            if block.batch1 is not None:
                moments1 = ops.z_moments(x, dw_weight, pw_weight, dw_bias, *config.arguments()[:3])
                moments1, count1 = block.batch1.join_moments(moments1)
                vectors1 = ops.norm_vectors(moments1, gamma1, beta1, block.batch1.eps)
            y = _make_y(x, dw_weight, pw_weight, dw_bias, pw_bias, vectors1, config)
            if block.batch2 is not None:
                moments2, count2 = block.batch2.join_moments(ops.moments(y))
                vectors2 = ops.norm_vectors(moments2, gamma2, beta2, block.batch2.eps)
            elif block.out_act != IDENTITY:
                vectors2 = _vectors_of_no_norm(y)
            out = y if vectors2 is None else ops.norm_act(y, vectors2, block.out_act)
        ctx.block, ctx.count1, ctx.count2 = block, count1, count2
        kept_y = None if block.recompute or vectors2 is None else y
        ctx.save_for_backward(x, dw_weight, pw_weight, dw_bias, pw_bias, vectors1, vectors2, kept_y)
        ctx.affine_dtypes = [None if t is None else t.dtype for t in (gamma1, beta1, gamma2, beta2)]
        ctx.mark_non_differentiable(*(m for m in (moments1, moments2) if m is not None))
        ctx.set_materialize_grads(False)
        return out, moments1, count1, moments2, count2

    @staticmethod
    def backward(ctx, grad_out, *_):
        if grad_out is None:
            return (None,) * 10
        if torch.is_grad_enabled():
            grads = _FirstDerivative.apply(ctx, grad_out, *ctx.saved_tensors)
        else:
            grads = _gradients(ctx, grad_out, *ctx.saved_tensors)
        return (*grads, None)

    @staticmethod
    def jvp(ctx, *tangents):
        raise NotImplementedError(
            f"{_OP}: forward-mode AD is not supported where a norm takes statistics of the batch; use backward mode, "
            f"or put the norms into eval mode"
        )


class _FirstDerivative(torch.autograd.Function):
    """The gradients of a block under create_graph: a graph that says in its own backward that there is no second."""

    @staticmethod
    def forward(ctx, block_ctx, grad_out, *saved):
        return _gradients(block_ctx, grad_out, *saved)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            f"{_OP}: double backward is not supported where a norm takes statistics of the batch; put the norms into "
            f"eval mode, whose derivatives of any order are right, or use nn.Conv2d and nn.BatchNorm2d for this loss"
        )


def _gradients(ctx, grad_out, x, dw_weight, pw_weight, dw_bias, pw_bias, vectors1, vectors2, y) -> tuple:
    """Of (x, dw_weight, pw_weight, dw_bias, pw_bias, gamma1, beta1, gamma2, beta2)."""
    ops, block, config = torch.ops.dsconv_cuda, ctx.block, ctx.block.config
    wanted = ctx.needs_input_grad
    weights = (x, dw_weight, pw_weight, dw_bias)
    geometry, precision = config.arguments()[:3], config.precision()
    gamma1 = beta1 = gamma2 = beta2 = sums2 = None
    # What a bias adds, the norm after it takes off again.
    mask = grad_mask(*wanted[:3], wanted[3] and vectors1 is None, wanted[4] and block.batch2 is None)
    with torch._C._AutoDispatchBelowAutograd():
        if vectors2 is not None:
            if y is None:
                y = _make_y(*weights, pw_bias, vectors1, config)
            if block.batch2 is not None:
                sums2 = ops.norm_act_sums(grad_out, y, vectors2, block.out_act)
                beta2, gamma2 = sums2.unbind(0)
                sums2 = block.batch2.join_sums(sums2)
        through_norm2 = (vectors2, sums2, ctx.count2)
        if block.batch1 is None:
            dy = ops.norm_act_grad(grad_out, y, *through_norm2, block.out_act)
            arguments = (dy, *weights, None, *config.arguments(), mask, *precision)
            grad_x, grad_dw, grad_pw, grad_b1, grad_b2 = ops.bwd(*arguments)
        else:
            arguments = (grad_out, y, *weights, vectors1, *through_norm2, *geometry, config.act, block.out_act)
            arguments += (mask, *precision)
            grad_b1 = None
            if block.batch1.is_shared():
                du, sums1, grad_pw, grad_b2 = ops.bwd_norm_pointwise(*arguments)
                shared = block.batch1.join_sums(sums1)
                grad_x, grad_dw = ops.bwd_norm_depthwise(du, *weights, vectors1, shared, ctx.count1, *geometry, mask)
            else:
                grad_x, grad_dw, grad_pw, grad_b2, sums1 = ops.bwd_norm(*arguments)
            beta1, gamma1 = sums1.unbind(0)
    if wanted[3] and vectors1 is not None:
        grad_b1 = torch.zeros_like(dw_bias)
    if wanted[4] and block.batch2 is not None:
        grad_b2 = torch.zeros_like(pw_bias)
    affine = (
        None if grad is None or dtype is None else grad.to(dtype)
        for grad, dtype in zip((gamma1, beta1, gamma2, beta2), ctx.affine_dtypes, strict=True)
    )
    grads = (grad_x, grad_dw, grad_pw, grad_b1, grad_b2, *affine)
    return tuple(g if w else None for g, w in zip(grads, wanted, strict=False))
