"""A BatchNorm as the functions take it: what it is handed, its checks, its folding into weights, what it tracks.

    s = gamma / sqrt(var + eps)        weight' = weight * s        bias' = (bias - mean) * s + beta

is the convolution with a norm of given statistics after it.
"""

import dataclasses
import functools

import torch
from torch import Tensor, nn

from dsconv_cuda import _checks, _loader
from dsconv_cuda.autograd import transformed


@dataclasses.dataclass
class BatchNormArguments:
    """What ``F.batch_norm`` takes beside its input, with its meaning, and a process group.

    ``training`` takes the statistics of the batch, moves ``running_mean`` and ``running_var``, where there are any, by
    ``momentum`` towards them, and adds one to ``num_batches_tracked``; otherwise the running ones are used. With a
    ``process_group`` the statistics of the batch are those of all processes of the group, as in ``nn.SyncBatchNorm``.
    """

    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    training: bool = False
    momentum: float | Tensor = 0.1
    eps: float = 1e-5
    process_group: object | None = None
    num_batches_tracked: Tensor | None = None


def arguments_of(norm: nn.Module, synchronised: bool) -> BatchNormArguments:
    """What nn.BatchNorm2d.forward and nn.SyncBatchNorm.forward hand to F.batch_norm."""
    momentum = 0.0 if norm.momentum is None else norm.momentum
    if norm.momentum is None and counts_batches(norm):  # the mean over all batches
        batches = norm.num_batches_tracked
        batches = batches.double() if torch.compiler.is_compiling() else float(batches)  # a number would be a constant
        momentum = 1.0 / (batches + 1.0)
    tracks = not norm.training or norm.track_running_stats
    return BatchNormArguments(
        # In eval mode without running statistics the batch's are taken and none are tracked.
        norm.running_mean if tracks else None,
        norm.running_var if tracks else None,
        norm.weight,
        norm.bias,
        takes_batch_statistics(norm),
        momentum,
        norm.eps,
        _process_group(norm) if synchronised and norm.training else None,
        norm.num_batches_tracked if counts_batches(norm) else None,
    )


def takes_batch_statistics(norm: nn.Module) -> bool:
    return norm.training or (norm.running_mean is None and norm.running_var is None)


def counts_batches(norm: nn.Module) -> bool:
    return norm.training and getattr(norm, "track_running_stats", False) and norm.num_batches_tracked is not None


def _process_group(norm: nn.SyncBatchNorm):
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        return None
    return norm.process_group or distributed.group.WORLD


def product(pixels: list) -> int:
    """math.prod(), which does not take the numbers of a graph of free sizes."""
    count = 1
    for extent in pixels:
        count = count * extent
    return count


def check_norm(op: str, name: str, bn: BatchNormArguments | None, x: Tensor, channels: int, pixels: list) -> None:
    if bn is None:
        return
    if not isinstance(bn, BatchNormArguments):
        raise TypeError(f"{op}: {name} must be a BatchNormArguments or None, got {type(bn).__name__}")
    wide = _checks.wide_dtype(x.dtype)
    for argument in ("running_mean", "running_var", "weight", "bias"):
        t = getattr(bn, argument)
        if t is None:
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: {name}.{argument} must be a Tensor or None, got {type(t).__name__}")
        if t.dim() != 1 or t.shape[0] != channels:
            raise ValueError(f"{op}: {name}.{argument} must have shape [{channels}], got {list(t.shape)}")
        if t.dtype not in (x.dtype, wide):
            raise TypeError(
                f"{op}: {name}.{argument} must have the dtype of input, {x.dtype}, or {wide}, got {t.dtype}; convert "
                f"one of them with .to()"
            )
        if t.device != x.device:
            raise RuntimeError(f"{op}: {name}.{argument} must be on the device of input, {x.device}, got {t.device}")
    if not bn.training:
        if bn.running_mean is None or bn.running_var is None:
            raise ValueError(f"{op}: {name} needs running_mean and running_var where training is False")
        if bn.eps < 0:
            raise ValueError(f"batch_norm eps must be non-negative, but got {bn.eps}")
        return
    if product(pixels) == 1 and (bn.process_group is None or bn.process_group.size() == 1):
        size = torch.Size((pixels[0], channels, *pixels[1:]))
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {size}")
    if bn.eps <= 0:
        raise ValueError(f"batch_norm eps must be positive during training, but got {bn.eps}")


def wide_parameter(t: Tensor | None) -> Tensor | None:
    """A parameter of a norm in the compute type."""
    return t.float() if t is not None and t.dtype in (torch.float16, torch.bfloat16) else t


def fold_norm(weight: Tensor, bias: Tensor | None, bn: BatchNormArguments) -> tuple[Tensor, Tensor]:
    """The weight and the bias of a convolution with the norm after it, differentiable in all.

    Scale and shift, a number a channel, are made in float64 and rounded once.
    """
    tensors = (weight, bias, bn.running_mean, bn.running_var, bn.weight, bn.bias)
    if _in_one_call(tensors):
        return _Fold.apply(*tensors, bn.eps)
    return _fold(*tensors, bn.eps)


_PLAIN_TYPES = frozenset((Tensor, nn.Parameter))


def _in_one_call(tensors: tuple) -> bool:
    """Whether there is an op for these, and nothing but first derivatives follows, or derivatives in eager mode."""
    weight = tensors[0]
    if torch.compiler.is_compiling() or not weight.is_contiguous():
        return False
    device = weight.device
    for t in tensors:
        if t is not None and (type(t) not in _PLAIN_TYPES or t.dtype not in _checks.DTYPES or t.device != device):
            return False
    if tensors[2].requires_grad or tensors[3].requires_grad or transformed():
        return False
    gradients = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return device.type in ("cpu", "cuda") and _has_fold(device.type.upper(), gradients)


@functools.cache
def _has_fold(key: str, gradients: bool) -> bool:
    _loader.load_library()
    return _loader.has_kernel("fold_norm", key) and (not gradients or _loader.has_kernel("fold_norm_bwd", key))


class _Fold(torch.autograd.Function):
    """_fold() of plain tensors, the statistics of which get no gradient."""

    @staticmethod
    def forward(ctx, weight, bias, mean, var, gamma, beta, eps: float):
        ctx.save_for_backward(weight, bias, mean, var, gamma, beta)
        ctx.eps = eps
        return torch.ops.dsconv_cuda.fold_norm.default(weight, bias, mean, var, gamma, beta, eps)

    @staticmethod
    def backward(ctx, grad_weight, grad_bias):
        tensors, wanted = ctx.saved_tensors, ctx.needs_input_grad
        if torch.is_grad_enabled() or transformed() or type(grad_weight) is not Tensor:
            with torch.enable_grad():
                # Aliases: whatever else the tensors are used for, and hooks on them, have no part in this.
                tensors = [t.view_as(t) if needed else t for t, needed in zip(tensors, wanted, strict=False)]
                asked = [t for t, needed in zip(tensors, wanted, strict=False) if needed]
                grads = iter(
                    torch.autograd.grad(_fold(*tensors, ctx.eps), asked, (grad_weight, grad_bias), create_graph=True)
                )
            return (*(next(grads) if needed else None for needed in wanted[:6]), None)
        weight, bias, mean, var, gamma, _ = tensors
        of_weight, of_bias, of_gamma, of_beta = torch.ops.dsconv_cuda.fold_norm_bwd.default(
            grad_weight, grad_bias, weight, bias, mean, var, gamma, ctx.eps
        )
        grads = (of_weight, of_bias, None, None, of_gamma, of_beta)
        return (
            *(g.to(t.dtype) if needed else None for g, t, needed in zip(grads, tensors, wanted, strict=False)),
            None,
        )


def _fold(weight: Tensor, bias: Tensor | None, mean, var, gamma, beta, eps: float) -> tuple[Tensor, Tensor]:
    mean, var, gamma, beta = (None if t is None else t.double() for t in (mean, var, gamma, beta))
    scale = torch.rsqrt(var + eps)
    if gamma is not None:
        scale = scale * gamma
    shift = (-mean if bias is None else bias.double() - mean) * scale
    if beta is not None:
        shift = shift + beta
    wide = torch.promote_types(weight.dtype, torch.float32)
    scaled = weight.to(wide) * scale.to(wide).view(-1, *(1,) * (weight.dim() - 1))
    return scaled.to(weight.dtype), shift.to(weight.dtype)


def norm_vectors(bn: BatchNormArguments) -> Tensor:
    """What the ops take of a norm with given statistics, float64."""
    moments = torch.stack((bn.running_mean, bn.running_var)).double()
    affine = (wide_parameter(t) for t in (bn.weight, bn.bias))
    return torch.ops.dsconv_cuda.norm_vectors(moments, *affine, bn.eps)


def track(bn: BatchNormArguments, moments: Tensor, count: float) -> None:
    """Moves the running statistics towards those of the batch; the variance without bias, as PyTorch does."""
    if bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
    if count == 0:  # an empty batch
        return
    running = [t for t in (bn.running_mean, bn.running_var) if t is not None]
    as_number = not isinstance(bn.momentum, Tensor)
    if as_number and not torch.compiler.is_compiling() and _loader.tracks_in_one_call(moments.device.type):
        torch.ops.dsconv_cuda.norm_track(moments, count, bn.momentum, bn.running_mean, bn.running_var)
        torch.autograd.graph.increment_version(running)
        return
    for statistic, row, scale in ((bn.running_mean, 0, 1.0), (bn.running_var, 1, count / (count - 1))):
        if statistic is not None:
            value = moments[row] if scale == 1.0 else moments[row] * scale
            momentum = bn.momentum if as_number else bn.momentum.to(statistic.dtype)
            statistic.lerp_(value.to(statistic.dtype), momentum)
