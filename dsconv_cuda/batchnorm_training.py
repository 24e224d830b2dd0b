"""A plain training step of the block dw -> BatchNorm -> act -> pw -> BatchNorm -> act, in as little Python as can be.

    step() -> TrainedBlock -> torch.ops.dsconv_cuda.train_fwd
                | backward
                v
              torch.ops.dsconv_cuda.train_bwd

The same numbers as batchnorm.py and batchnorm_autograd.py give, which do it op by op: those are for whatever is not
plain, and say what is wrong with arguments. Plain are tensors on the CPU, under autocast or not, both norms in
training, statistics of this process alone, no mode, transform or subclass.
"""

import dataclasses
import functools
import math

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from dsconv_cuda import _checks, _loader
from dsconv_cuda.activations import ACTIVATIONS
from dsconv_cuda.autograd import kept_arguments, transformed
from dsconv_cuda.batchnorm import Unnormalised
from dsconv_cuda.batchnorm_autograd import Batch, BatchNormBlock, Block, operation, train_mask
from dsconv_cuda.deferred import Deferred
from dsconv_cuda.functional import cast_for_autocast
from dsconv_cuda.norms import wide_parameter
from dsconv_cuda.ops import IDENTITY

_TENSORS = (Tensor, nn.Parameter)
_PLAIN_TYPES = frozenset((*_TENSORS, type(None)))
_DTYPES = frozenset(_checks.DTYPES)

_is_grad_enabled = torch.is_grad_enabled
_functorch_active = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack
_increment_version = torch.autograd.graph.increment_version


class _Refused(Exception):
    """train_fwd does not take these arguments; nothing has been changed."""


class _Call:
    """The arguments of one call that get no gradient, and with `defer` the vectors of the second norm afterwards."""

    __slots__ = ("defer", "eps", "in_act", "kept", "momenta", "recompute", "running", "vectors")


class TrainedBlock(torch.autograd.Function):
    """BatchNormBlock for a plain call; takes the same inputs, `call` for the last."""

    @staticmethod
    def forward(ctx, x, dw_weight, pw_weight, dw_bias, pw_bias, gamma1, beta1, gamma2, beta2, in_vectors, call: _Call):
        kept, running, (eps1, eps2), (momentum1, momentum2) = call.kept, call.running, call.eps, call.momenta
        if type(x) is Deferred:
            x = x.y
        try:
            out, y, vectors1, vectors2 = _train_fwd()(
                x, dw_weight, pw_weight, dw_bias, pw_bias, gamma1, beta1, gamma2, beta2, *running,
                eps1, momentum1, eps2, momentum2, kept.arguments, in_vectors, call.in_act, call.defer,
            )  # fmt: skip
        except (RuntimeError, TypeError) as error:
            raise _Refused from error
        _increment_version([t for t in running if t is not None])
        if call.defer:
            call.vectors = vectors2
        elif call.recompute:
            y = None
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, dw_weight, pw_weight, dw_bias, pw_bias, in_vectors, vectors1, vectors2, y)
        return out

    @staticmethod
    def backward(ctx, grad):
        call = ctx.call
        if (
            type(grad) is not Tensor
            or _is_grad_enabled()
            or _dispatch_modes()
            or _functorch_active()
            or forward_ad._current_level >= 0
        ):
            return _backward_op_by_op(ctx, grad)
        x, dw_weight, pw_weight, dw_bias, pw_bias, in_vectors, vectors1, vectors2, y = ctx.saved_tensors
        grads = _train_bwd()(
            grad, y, x, dw_weight, pw_weight, dw_bias, pw_bias, vectors1, vectors2, call.kept.arguments,
            train_mask(ctx.needs_input_grad), in_vectors, call.in_act,
        )  # fmt: skip
        return (*grads, None, None)


def _backward_op_by_op(ctx, grad) -> tuple:
    call, (x, dw_weight, pw_weight, *_) = ctx.call, ctx.saved_tensors
    config = call.kept.config
    op = operation(len(config.stride))
    count = x.shape[0] * math.prod(
        _checks.check_extents(op, x.shape, dw_weight.shape, pw_weight.shape, *config.arguments()[:3])
    )
    norms = (Batch(eps, count, None) for eps in call.eps)
    linear = dataclasses.replace(config, out_act=IDENTITY)
    ctx.op, ctx.block = op, Block(op, linear, config.out_act, *norms, call.recompute, call.in_act, call.defer)
    ctx.count1 = ctx.count2 = float(count)
    wide = _checks.wide_dtype(x.dtype)
    ctx.affine_dtypes = [wide if needed else None for needed in ctx.needs_input_grad[5:9]]
    return BatchNormBlock.backward(ctx, grad)


@functools.cache
def _train_fwd():
    return torch.ops.dsconv_cuda.train_fwd.default


@functools.cache
def _train_bwd():
    return torch.ops.dsconv_cuda.train_bwd.default


@functools.lru_cache(maxsize=1024)
def _arguments(dw_shape, pw_shape, stride, padding, dilation, activation: str, out_activation: str):
    """None where the kernels are not there or the arguments are wrong, which is said elsewhere."""
    _loader.load_library()
    dims = len(dw_shape) - 2
    if not _loader.has_kernel("train_fwd", "CPU") or dims not in (1, 2, 3):
        return None
    op = operation(dims)
    try:
        if dims == 1:
            stride, dilation = (1, _checks.single(op, "stride", stride)), (1, _checks.single(op, "dilation", dilation))
            padding = _checks.padding_1d(op, padding, dw_shape[2], stride[1], dilation[1])
            dw_shape, pw_shape = torch.Size((*dw_shape[:2], 1, dw_shape[2])), pw_shape[:2]
        else:
            stride = _checks.per_axis(op, "stride", stride, 1, dims)
            dilation = _checks.per_axis(op, "dilation", dilation, 1, dims)
            padding = _checks.padding(op, padding, dw_shape[2:], stride, dilation)
        activations = ACTIVATIONS[activation].number, ACTIVATIONS[out_activation].number
    except (KeyError, TypeError, ValueError):
        return None
    return kept_arguments(dw_shape, pw_shape, stride, padding, dilation, *activations)


def step(
    input: Tensor | Unnormalised,
    depthwise: nn.Module,
    bn1: nn.Module,
    pointwise: nn.Module,
    bn2: nn.Module,
    activation: str,
    out_activation: str,
    *,
    causal: bool = False,
    recompute_output: bool = False,
    defer: bool = False,
) -> Tensor | Unnormalised | None:
    """The block of these modules, which must compute what their classes say; None where the call is not plain."""
    before = input if type(input) is Unnormalised else None
    x = input if before is None else before.y
    if type(x) not in _TENSORS or not x.is_cpu or x.dtype not in _DTYPES or transformed():
        return None
    try:
        convolution, norm1, norm2 = depthwise._parameters, bn1._parameters, bn2._parameters
        dw_weight, dw_bias = convolution["weight"], convolution["bias"]
        convolution = pointwise._parameters
        tensors = (
            x, dw_weight, convolution["weight"], dw_bias, convolution["bias"],
            norm1["weight"], norm1["bias"], norm2["weight"], norm2["bias"],
        )  # fmt: skip
        running = (*_running(bn1), *_running(bn2))
    except KeyError:  # parametrized
        return None
    if not _PLAIN_TYPES.issuperset(map(type, tensors)) or not _PLAIN_TYPES.issuperset(map(type, running)):
        return None
    call = _Call()
    call.eps, call.momenta = (bn1.eps, bn2.eps), (bn1.momentum, bn2.momentum)
    if None in call.momenta or not (bn1.training and bn2.training):
        return None
    try:
        shapes = dw_weight.shape, tensors[2].shape
        geometry = depthwise.stride, "causal" if causal else depthwise.padding, depthwise.dilation
        call.kept = kept = _arguments(*shapes, *geometry, activation, out_activation)
    except (AttributeError, TypeError):  # no weight; a list for a tuple
        return None
    if kept is None:
        return None
    operands, affine = cast_for_autocast(tensors[:5]), tensors[5:]
    if operands[0].dtype not in _checks.WIDE:
        affine = map(wide_parameter, affine)
    tensors = (*operands, *affine)
    call.running, call.recompute, call.defer = running, recompute_output, defer
    in_vectors, call.in_act = (None, 0) if before is None else (before.vectors, before.act)
    one_row = x.dim() == dw_weight.dim() == 3
    if one_row:
        x, dw_weight, pw_weight, *others = tensors
        tensors = (x.unsqueeze(-2), dw_weight.unsqueeze(-2), pw_weight.unsqueeze(-1), *others)
    if before is not None and before.deferred is not None:
        tensors = (before.deferred, *tensors[1:])
    try:
        out = TrainedBlock.apply(*tensors, in_vectors, call)
    except _Refused:
        return None
    if one_row:
        out = out.squeeze(-2)
    return Unnormalised(out, call.vectors, kept.config.out_act) if defer else out


def _running(norm: nn.Module) -> tuple:
    """What a norm tracks: mean, variance, number of batches."""
    if not norm.track_running_stats:
        return None, None, None
    buffers = norm._buffers
    return buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"]
