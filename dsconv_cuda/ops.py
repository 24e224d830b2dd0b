"""The Python side of the ops: fake kernels and the gradients of the bare ops; vmap_rules.py has their vmap rules.

:func:`register_python_parts` is called once, by ``dsconv_cuda._loader.load_library``, when the C++ library has defined
the ops:

    fwd(x, dw_weight, pw_weight, dw_bias?, pw_bias?, stride, padding, dilation, act, out_act, fast=False) -> y
    fwd_with_pre(the same) -> (y, y before out_act)
    bwd(dy, x, dw_weight, pw_weight, dw_bias?, saved?, stride, padding, dilation, act, out_act, grad_mask, fast=False)
        -> gradients of (x, dw_weight, pw_weight, dw_bias, pw_bias), of shape [0] where grad_mask does not ask

x and the weights are those of a 2-D convolution, or those of a 3-D one, whose dw_weight has a depth in front of height
and width; pw_weight may do without its ones. padding is (top, left, bottom, right), in 3-D (front, top, left, back,
bottom, right); stride and dilation have a number for each axis. act and out_act are numbers of activations.py,
grad_mask sums GRAD_*. fast lets CUDA round the operands of float32 products of the pointwise part to TF32, and leave
those of other types to cuBLAS; the CPU takes no notice of it. `saved` is what out_act's derivative is told from: y, or
y before out_act (see activations.derivative_from_output), None for identity.

Shapes, strides and checks here are those of csrc/op_args.h; opcheck holds the two against each other.
"""

import importlib
import math

import torch
from torch import Tensor

from dsconv_cuda import _checks, _loader, compiled_weights, compiler_cache, flops, graph_ops
from dsconv_cuda.activations import ACTIVATIONS, derivative_from_output

# params.h GradBit, in the order of bwd's outputs
GRAD_X, GRAD_DW_WEIGHT, GRAD_PW_WEIGHT, GRAD_DW_BIAS, GRAD_PW_BIAS = GRAD_BITS = (1, 2, 4, 8, 16)

IDENTITY = ACTIVATIONS["identity"].number

_registered = False
_fragment: torch.library.Library | None = None  # registrations last as long as this object


def grad_mask(*needed: bool) -> int:
    """The grad_mask that asks for the gradients of (x, dw_weight, pw_weight, dw_bias, pw_bias) marked True."""
    return sum(bit for bit, wanted in zip(GRAD_BITS, needed, strict=True) if wanted)


def asked_for(grads, mask: int) -> tuple:
    """The gradients of these five, None in the place of those that the mask does not ask for."""
    return tuple(g if mask & bit else None for g, bit in zip(grads, GRAD_BITS, strict=True))


# ---- fake kernels ----------------------------------------------------------------------------------------------------


_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def suggests_channels_last(t: Tensor) -> bool:
    """PyTorch's suggest_memory_format() == channels_last, or channels_last_3d: walking c, w, h, d, n, strides never
    decrease."""
    if t.dim() not in _CHANNELS_LAST or t.stride(1) == 0:
        return False
    min_stride = 0
    for d in (1, *range(t.dim() - 1, 1, -1), 0):
        size, stride = t.shape[d], t.stride(d)
        if size == 0 or stride < min_stride:
            return False
        if d == 0 and min_stride == t.stride(1):  # one channel and one pixel: ambiguous, contiguous
            return False
        min_stride = stride * (size if size > 1 else 1)
    return True


def _memory_format(*tensors: Tensor) -> torch.memory_format:
    channels_last = any(suggests_channels_last(t) for t in tensors)
    return _CHANNELS_LAST[tensors[0].dim()] if channels_last else torch.contiguous_format


def _empty(like: Tensor, shape: tuple, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format)


def _output_shape(op: str, x: Tensor, dw_weight: Tensor, pw_weight: Tensor, stride, padding, dilation) -> tuple:
    axes = len(stride)
    dims, kernel, ones = axes + 2, ", ".join(("kd", "kh", "kw")[-axes:]), ", 1" * axes
    torch._check(x.dim() == dims, lambda: f"{op}: input must have {dims} dimensions, got {x.dim()}")
    torch._check(
        dw_weight.dim() == dims and dw_weight.shape[1] == 1,
        lambda: f"{op}: dw_weight must have shape [C * m, 1, {kernel}]",
    )
    torch._check(
        pw_weight.dim() == 2 or (pw_weight.dim() == dims and all(size == 1 for size in pw_weight.shape[2:])),
        lambda: f"{op}: pw_weight must have shape [C_out, C * m{ones}] or [C_out, C * m]",
    )
    torch._check(
        x.shape[1] > 0 and dw_weight.shape[0] > 0 and dw_weight.shape[0] % x.shape[1] == 0,
        lambda: (
            f"{op}: dw_weight's channels must be a positive multiple of input's {x.shape[1]}, got {dw_weight.shape[0]}"
        ),
    )
    torch._check(
        pw_weight.shape[1] == dw_weight.shape[0],
        lambda: f"{op}: pw_weight must have {dw_weight.shape[0]} input channels, got {pw_weight.shape[1]}",
    )
    extents = []
    for axis in range(axes):
        span = dilation[axis] * (dw_weight.shape[2 + axis] - 1) + 1
        padded = x.shape[2 + axis] + padding[axis] + padding[axes + axis]
        torch._check(padded >= span, lambda s=span, p=padded: f"{op}: kernel larger than the padded input: {s} > {p}")
        extents.append((padded - span) // stride[axis] + 1)
    return (x.shape[0], pw_weight.shape[0], *extents)


def _fwd_fake(x, dw_weight, pw_weight, dw_bias, pw_bias, stride, padding, dilation, act, out_act, fast=False):
    shape = _output_shape("dsconv_cuda::fwd", x, dw_weight, pw_weight, stride, padding, dilation)
    return _empty(x, shape, _memory_format(x, dw_weight, pw_weight))


def _fwd_with_pre_fake(*args):
    return _fwd_fake(*args), _fwd_fake(*args)


def _bwd_fake(dy, x, dw_weight, pw_weight, dw_bias, saved, stride, padding, dilation, act, out_act, mask, fast=False):
    shape = _output_shape("dsconv_cuda::bwd", x, dw_weight, pw_weight, stride, padding, dilation)
    torch._check(
        dy.dim() == x.dim() and all(a == b for a, b in zip(dy.shape, shape, strict=True)),
        lambda: f"dsconv_cuda::bwd: grad_output must have the shape of the output, {list(shape)}",
    )
    shapes = (x.shape, dw_weight.shape, pw_weight.shape, (dw_weight.shape[0],), (pw_weight.shape[0],))
    grads = [_empty(x, size if mask & bit else (0,)) for size, bit in zip(shapes, GRAD_BITS, strict=True)]
    if mask & GRAD_X:
        grads[0] = _empty(x, x.shape, _memory_format(x))
    return tuple(grads)


def _doubles(like: Tensor, rows: int, channels: int) -> Tensor:
    return torch.empty(rows, channels, dtype=torch.float64, device=like.device)


def _z_moments_fake(x, dw_weight, pw_weight, dw_bias, stride, padding, dilation, in_vectors=None, in_act=0):
    _output_shape("dsconv_cuda::z_moments", x, dw_weight, pw_weight, stride, padding, dilation)
    return _doubles(x, 2, dw_weight.shape[0])


def _fwd_norm_fake(
    x, dw_weight, pw_weight, dw_bias, pw_bias, vectors, stride, padding, dilation, act, want_moments,
    in_vectors=None, in_act=0, fast=False,
):  # fmt: skip
    y = _fwd_fake(x, dw_weight, pw_weight, dw_bias, pw_bias, stride, padding, dilation, act, IDENTITY)
    return y, _doubles(x, 2, pw_weight.shape[0] if want_moments else 0)


def _empty_like_v(v: Tensor) -> Tensor:
    return _empty(v, v.shape, _memory_format(v))


def _du_size(x: Tensor, dw_weight: Tensor, shape: tuple) -> int:
    channels = dw_weight.shape[0]
    if channels == x.shape[1]:
        channels = (channels + 63) // 64 * 64
    return shape[0] * math.prod(shape[2:]) * channels


def _bwd_norm_fake(
    grad, y, x, dw_weight, pw_weight, dw_bias, vectors, out_vectors, out_sums, out_count, stride, padding, dilation,
    act, out_act, mask, in_vectors=None, in_act=0, fast=False,
):  # fmt: skip
    config = (stride, padding, dilation, act, out_act, mask & ~GRAD_DW_BIAS)
    grads = _bwd_fake(grad, x, dw_weight, pw_weight, dw_bias, None, *config)
    return (*grads[:3], grads[4], _doubles(x, 2, dw_weight.shape[0]))


def _bwd_norm_pointwise_fake(
    grad, y, x, dw_weight, pw_weight, dw_bias, vectors, out_vectors, out_sums, out_count, stride, padding, dilation,
    act, out_act, mask, in_vectors=None, in_act=0, fast=False,
):  # fmt: skip
    shape = _output_shape("dsconv_cuda::bwd_norm_pointwise", x, dw_weight, pw_weight, stride, padding, dilation)
    dtype = _checks.wide_dtype(x.dtype)
    du = torch.empty(_du_size(x, dw_weight, shape), dtype=dtype, device=x.device)
    sizes = ((pw_weight.shape, GRAD_PW_WEIGHT), ((pw_weight.shape[0],), GRAD_PW_BIAS))
    grads = (_empty(x, size if mask & bit else (0,)) for size, bit in sizes)
    return (du, _doubles(x, 2, dw_weight.shape[0]), *grads)


def _bwd_norm_depthwise_fake(
    du, x, dw_weight, pw_weight, dw_bias, vectors, sums, count, stride, padding, dilation, mask,
    in_vectors=None, in_act=0,
):  # fmt: skip
    grad_x = _empty(x, x.shape, _memory_format(x)) if mask & GRAD_X else _empty(x, (0,))
    return grad_x, _empty(x, dw_weight.shape if mask & GRAD_DW_WEIGHT else (0,))


def _gate_means_fake(x, dw_weight, pw_weight, dw_bias, vectors, stride, padding, dilation, act, keep):
    n, _, *extents = _output_shape("dsconv_cuda::gate_means", x, dw_weight, pw_weight, stride, padding, dilation)
    c_mid = dw_weight.shape[0]
    kept = _empty(x, (n, c_mid, *extents), _CHANNELS_LAST[x.dim()]) if keep else _empty(x, (0,))
    return _empty_wide(x, n, c_mid), kept


def _empty_wide(x: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=_checks.wide_dtype(x.dtype), device=x.device)


def _fwd_gated_fake(x, dw_weight, pw_weight, dw_bias, pw_bias, gate, vectors, kept, *arguments):
    return _fwd_fake(x, dw_weight, pw_weight, dw_bias, pw_bias, *arguments)


def _bwd_gate_fake(dy, x, dw_weight, pw_weight, dw_bias, gate, vectors, stride, padding, dilation, act):
    c_mid = dw_weight.shape[0]
    return _empty_wide(x, pw_weight.shape[0], c_mid), _empty_wide(x, x.shape[0], c_mid)


def _bwd_gated_fake(
    dy, x, dw_weight, pw_weight, dw_bias, gate, push, vectors, stride, padding, dilation, act, mask
):  # fmt: skip
    config = (stride, padding, dilation, act, IDENTITY)
    mask &= GRAD_X | GRAD_DW_WEIGHT | (GRAD_DW_BIAS if vectors is None else 0)
    grads = _bwd_fake(dy, x, dw_weight, pw_weight, dw_bias, None, *config, mask)
    return grads[0], grads[1], grads[3], _doubles(x, 2, 0 if vectors is None else dw_weight.shape[0])


_NORM_FAKES = {
    "z_moments": _z_moments_fake,
    "norm_vectors": lambda moments, weight, bias, eps: _doubles(moments, 4, moments.shape[1]),
    "norm_track": lambda moments, count, momentum, running_mean, running_var: None,
    "fwd_norm": _fwd_norm_fake,
    "moments": lambda v: _doubles(v, 2, v.shape[1]),
    "norm_act": lambda v, vectors, act: _empty_like_v(v),
    "norm_act_sums": lambda grad, v, vectors, act: _doubles(v, 2, v.shape[1]),
    "norm_act_grad": lambda grad, v, vectors, sums, count, act: _empty_like_v(v),
    "bwd_norm": _bwd_norm_fake,
    "bwd_norm_pointwise": _bwd_norm_pointwise_fake,
    "bwd_norm_depthwise": _bwd_norm_depthwise_fake,
    "gate_means": _gate_means_fake,
    "fwd_gated": _fwd_gated_fake,
    "bwd_gate": _bwd_gate_fake,
    "bwd_gated": _bwd_gated_fake,
}


# ---- gradients of the bare ops ---------------------------------------------------------------------------------------
# What a compiled or exported graph trains through; a compiled one holds the ops of graph_ops.py in their place. Eager
# calls of the package go through autograd.py, which also has double backward, forward-mode AD and torch.func.


def _setup_context(ctx, inputs, output):
    x, dw_weight, pw_weight, dw_bias, pw_bias, *config = inputs
    y, pre = output if isinstance(output, tuple) else (output, None)
    if pre is not None:
        ctx.mark_non_differentiable(pre)
    out_act = config[4]
    saved = None
    if out_act != IDENTITY:
        saved = y if derivative_from_output(out_act) else pre
    recomputed = saved is None and out_act != IDENTITY
    ctx.config = config
    ctx.save_for_backward(x, dw_weight, pw_weight, dw_bias, pw_bias if recomputed else None, saved)


def _backward(ctx, dy, *_):
    x, dw_weight, pw_weight, dw_bias, pw_bias, saved = ctx.saved_tensors
    *geometry, act, out_act, fast = ctx.config
    mask = grad_mask(*ctx.needs_input_grad[:5])
    if mask == 0:
        return (None,) * 11
    if saved is None and out_act != IDENTITY:
        # fwd was called by hand where fwd_with_pre would have kept what its derivative needs
        saved = torch.ops.dsconv_cuda.fwd(x, dw_weight, pw_weight, dw_bias, pw_bias, *geometry, act, IDENTITY, fast)
    grads = torch.ops.dsconv_cuda.bwd(dy, x, dw_weight, pw_weight, dw_bias, saved, *geometry, act, out_act, mask, fast)
    return (*(g if mask & bit else None for g, bit in zip(grads, GRAD_BITS, strict=True)), *(None,) * 6)


def _no_double_backward(ctx, *grads):
    raise RuntimeError(
        "dsconv_cuda::bwd has no gradient of its own: call dsconv_cuda.depthwise_separable_conv2d in eager mode "
        "for double backward, it differentiates to any order"
    )


def register_python_parts() -> None:
    """Registers the fake kernels, gradients and vmap rules; the ops must have been defined. Does it only once."""
    global _registered, _fragment
    if _registered:
        return
    _registered = True
    fakes = {"fwd": _fwd_fake, "fwd_with_pre": _fwd_with_pre_fake, "bwd": _bwd_fake}
    for name, fake in fakes.items():
        torch.library.register_fake(f"dsconv_cuda::{name}", fake)
    for name, fake in _NORM_FAKES.items():
        torch.library.register_fake(f"dsconv_cuda::{name}", fake)
    for name in ("fwd", "fwd_with_pre"):
        torch.library.register_autograd(f"dsconv_cuda::{name}", _backward, setup_context=_setup_context)
    torch.library.register_autograd("dsconv_cuda::bwd", _no_double_backward)
    _fragment = torch.library.Library("dsconv_cuda", "FRAGMENT")
    if hasattr(torch.ops.dsconv_cuda, "z_moments"):
        importlib.import_module(".batchnorm_graph", __package__).register(_fragment)
    graph_ops.register(_fragment, fakes)
    if hasattr(torch.ops.dsconv_cuda, "fwd_kept"):
        if _loader.has_kernel("fwd_kept", "CPU"):
            compiled_weights.register(_fragment, _fwd_fake)
            importlib.import_module(".compiled_folding", __package__).register(_fragment, _fwd_fake)
        # Called below autograd and only there.
        below = ("keep", "fwd_kept", "fwd_after_norm_kept", "fwd_with_pre_kept", "bwd_kept", "seen_again")
        for name in (*below, "train_fwd", "train_bwd", "fold_norm", "fold_norm_bwd"):
            _fragment.impl(name, torch.library.fallthrough_kernel, "Autograd")
    importlib.import_module(".vmap_rules", __package__).register(_fragment, fakes)
    compiler_cache.mark()
    flops.register()
