"""What torch.utils.flop_counter counts for the ops: as much as for the two convolutions that each stands for.

The formulas are PyTorch's own, of the depthwise and of the pointwise part. What an op makes again instead of keeping it
(z, in backward and for its statistics) is not counted, except by ``recompute_output``, whose second forward is one. In
a block that trains, backward always makes the gradient of z, for the sums of the first norm, and it counts.

The counter's import takes 60 ms, most of it triton's, and who does not count has no use for it. So the formulas are
registered when it is there: as the library is loaded, and by calls inside of a counter.
"""

import functools
import sys
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from dsconv_cuda import _checks

Shape = torch.Size

# params.h GradBit, and behind it the bits of train_bwd for the parameters of the first norm
_X, _DW_WEIGHT, _PW_WEIGHT, _DW_BIAS = 1, 2, 4, 8
_NORM1 = 32 | 64
_NEED_Z = _X | _DW_WEIGHT | _DW_BIAS | _NORM1


def register() -> None:
    """Has the counter know the ops, if it is imported: every counter that is made from now on, and those at work."""
    counter = sys.modules.get("torch.utils.flop_counter")
    if not hasattr(counter, "FlopCounterMode"):  # not there, or being imported by another thread
        return
    formulas = _registered()
    for mode in _get_current_dispatch_mode_stack():
        if isinstance(mode, counter._FlopCounterMode):
            known = mode.counter.flop_registry
            known.update({op: formula for op, formula in formulas.items() if op not in known})


def register_in_modes() -> None:
    """register(), where a call may be counted."""
    if torch._C._len_torch_dispatch_stack():
        register()


@functools.cache
def _registered() -> dict:
    """The registered formulas by their ops."""
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    formulas = {}
    for names, formula in _FORMULAS.items():
        for name in names:
            op = getattr(torch.ops.dsconv_cuda, name, None)  # libraries of other builds have not all
            if op is not None and op not in flop_registry:
                formulas[op] = register_flop_formula(op)(formula)
    return formulas


# ---- formulas, of shapes ---------------------------------------------------------------------------------------------
# They name the arguments of the ops as far as they need them.


def _forward(x: Shape, dw_weight: Shape, pw_weight: Shape, *_, out_shape, **__) -> int:
    from torch.utils.flop_counter import conv_flop_count

    y = out_shape if isinstance(out_shape, Shape) else out_shape[0]
    z = _like(y, dw_weight)
    return conv_flop_count(x, dw_weight, z) + conv_flop_count(z, pw_weight, y)


def _like(y: Shape, dw_weight: Shape) -> Shape:
    """The shape of z beside that of y."""
    return Shape((y[0], dw_weight[0], *y[2:]))


def _convolution_backward(grad: Shape, x: Shape, weight: Shape, for_x: bool, for_weight: bool) -> int:
    from torch.utils.flop_counter import conv_backward_flop

    geometry = (None, None, None, None, False, None, None)  # of which the formula takes the fifth alone, transposed
    return conv_backward_flop(grad, x, weight, *geometry, [for_x, for_weight], out_val=(x, weight))


def _backward(dy: Shape, x: Shape, dw_weight: Shape, pw_weight: Shape, grad_mask: int) -> int:
    z = _like(dy, dw_weight)
    pointwise = _convolution_backward(dy, z, pw_weight, bool(grad_mask & _NEED_Z), bool(grad_mask & _PW_WEIGHT))
    return pointwise + _convolution_backward(z, x, dw_weight, bool(grad_mask & _X), bool(grad_mask & _DW_WEIGHT))


def _bwd(
    dy, x, dw_weight, pw_weight, dw_bias, saved, stride, padding, dilation, act, out_act, grad_mask, *_, **__
) -> int:
    return _backward(dy, x, dw_weight, pw_weight, grad_mask)


def _bwd_kept(dy, x, dw_weight, pw_weight, dw_bias, saved, *arguments_and_mask, **__) -> int:
    return _backward(dy, x, dw_weight, pw_weight, arguments_and_mask[1])


def _forward_each(x, dw_weight, pw_weight, *_, out_shape, **__) -> int:
    y = out_shape if isinstance(out_shape, Shape) else out_shape[0]
    return x[0] * _forward(x[1:], dw_weight[1:], pw_weight[1:], out_shape=y[1:])


def _bwd_each(dy, x, dw_weight, pw_weight, dw_bias, saved, arguments, grad_mask, *_, **__) -> int:
    return x[0] * _backward(dy[1:], x[1:], dw_weight[1:], pw_weight[1:], grad_mask)


def _train_bwd(
    grad, y, x, dw_weight, pw_weight, dw_bias, pw_bias, vectors1, vectors2, *arguments_and_mask, **__
) -> int:
    return _backward(grad, x, dw_weight, pw_weight, arguments_and_mask[1])


def _bwd_norm(
    grad, y, x, dw_weight, pw_weight, dw_bias, vectors, out_vectors, out_sums, out_count, stride, padding, dilation,
    act, out_act, grad_mask, *_, **__,
) -> int:  # fmt: skip
    return _backward(grad, x, dw_weight, pw_weight, grad_mask | _NORM1)  # its sums are always made


def _bwd_norm_pointwise(
    grad, y, x, dw_weight, pw_weight, dw_bias, vectors, out_vectors, out_sums, out_count, stride, padding, dilation,
    act, out_act, grad_mask, *_, **__,
) -> int:  # fmt: skip
    return _backward(grad, x, dw_weight, pw_weight, (grad_mask & _PW_WEIGHT) | _NORM1)


def _bwd_norm_depthwise(
    du, x, dw_weight, pw_weight, dw_bias, vectors, sums, count, stride, padding, dilation, grad_mask, *_, **__
) -> int:
    extents = _checks.check_extents("bwd_norm_depthwise", x, dw_weight, pw_weight, stride, padding, dilation)
    z = Shape((x[0], dw_weight[0], *extents))
    return _convolution_backward(z, x, dw_weight, bool(grad_mask & _X), bool(grad_mask & _DW_WEIGHT))


def _bwd_gate(dy, x, dw_weight, pw_weight, *_, **__) -> int:
    return _backward(dy, x, dw_weight, pw_weight, _PW_WEIGHT)


def _bwd_gated(
    dy, x, dw_weight, pw_weight, dw_bias, gate, push, vectors, stride, padding, dilation, act, grad_mask, *_, **__
) -> int:
    return _backward(dy, x, dw_weight, pw_weight, grad_mask | _NORM1)


_FORMULAS: dict[tuple[str, ...], Callable[..., int]] = {
    (
        "fwd",
        "fwd_with_pre",
        "fwd_norm",
        "fwd_packed",
        "fwd_folded",
        "fwd_kept",
        "fwd_after_norm_kept",
        "fwd_with_pre_kept",
        "train_fwd",
        "fwd_in_graph",
        "fwd_with_pre_in_graph",
        "fwd_after_norm_in_graph",
        "train_fwd_in_graph",
        "fwd_gated",
    ): _forward,
    ("fwd_each", "fwd_with_pre_each"): _forward_each,
    ("bwd_each",): _bwd_each,
    ("bwd",): _bwd,
    ("bwd_kept", "bwd_in_graph"): _bwd_kept,
    ("train_bwd", "train_bwd_in_graph"): _train_bwd,
    ("bwd_norm",): _bwd_norm,
    ("bwd_norm_pointwise",): _bwd_norm_pointwise,
    ("bwd_norm_depthwise",): _bwd_norm_depthwise,
    ("bwd_gate",): _bwd_gate,
    ("bwd_gated",): _bwd_gated,
}
