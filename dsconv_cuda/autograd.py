"""The op as a differentiable function: one torch.autograd.Function for forward and one for backward.

    functional.py -> apply() -> DepthwiseSeparable -> torch.ops.dsconv_cuda.fwd / fwd_with_pre
                                  | backward
                                  v
                                DepthwiseSeparableGrad -> torch.ops.dsconv_cuda.bwd
                                  | backward, jvp
                                  v
                                second_order.py (stock PyTorch convolutions)

That backward is a Function of its own is what makes double backward, torch.func.grad, hessian and vmap(grad) right: the
ops alone have first-order gradients only. Both are written with setup_context and jvp, as torch.func asks for.

Saved for backward: the input, the weights and the biases; with an out_activation also y, or y before it where its
derivative cannot be told from y. z and act(z) are recomputed.
"""

import contextlib

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dsconv_cuda import decompositions, second_order
from dsconv_cuda.activations import derivative_from_output
from dsconv_cuda.ops import GRAD_BITS, IDENTITY, backward_vmap, forward_vmap, grad_mask
from dsconv_cuda.second_order import Config


class DepthwiseSeparable(torch.autograd.Function):
    """y, or (y, pre) where backward needs pre, y before out_act.

    pre is an output so that it can be saved, and goes nowhere else: nothing ever reaches its gradient.
    """

    @staticmethod
    def forward(x, dw_weight, pw_weight, dw_bias, pw_bias, config: Config):
        ops = torch.ops.dsconv_cuda
        forward = ops.fwd if derivative_from_output(config.out_act) else ops.fwd_with_pre
        return forward(x, dw_weight, pw_weight, dw_bias, pw_bias, *config.arguments(), *config.precision())

    @staticmethod
    def setup_context(ctx, inputs, output):
        *primals, ctx.config = inputs
        saved = None
        if isinstance(output, tuple):
            saved = output[1]
        elif ctx.config.out_act != IDENTITY:
            saved = output
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*primals, saved)
        ctx.save_for_forward(*primals)

    @staticmethod
    def backward(ctx, dy, *_):
        if dy is None:
            return (None,) * 6
        *primals, saved = ctx.saved_tensors
        mask = grad_mask(*ctx.needs_input_grad[:5])
        if _derivatives_may_follow((dy, *primals)):
            grads = DepthwiseSeparableGrad.apply(dy, *primals, saved, ctx.config, mask)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                grads = DepthwiseSeparableGrad.forward(dy, *primals, saved, ctx.config, mask)
        return (*_asked_for(grads, mask), None)

    @staticmethod
    def jvp(ctx, *tangents):
        with _outer_forward_ad(ctx.saved_tensors) as primals:
            tangents = second_order.forward_jvp(primals, tangents[:5], ctx.config)
        return tangents[0] if derivative_from_output(ctx.config.out_act) else tangents

    @staticmethod
    def vmap(info, in_dims, *args):
        return forward_vmap(DepthwiseSeparable.apply)(info, in_dims, *args)


class _DepthwiseSeparableEager(torch.autograd.Function):
    """DepthwiseSeparable without setup_context, which torch.func needs and which costs a call some 20 us."""

    @staticmethod
    def forward(ctx, *inputs):
        with torch._C._AutoDispatchBelowAutograd():
            output = DepthwiseSeparable.forward(*inputs)
        DepthwiseSeparable.setup_context(ctx, inputs, output)
        return output

    backward = DepthwiseSeparable.backward
    jvp = DepthwiseSeparable.jvp


class DepthwiseSeparableGrad(torch.autograd.Function):
    """The gradients of (x, dw_weight, pw_weight, dw_bias, pw_bias); one that is not asked for has shape [0].

    `saved` is a function of the other inputs, so its derivatives count as theirs and it gets none of its own.
    """

    @staticmethod
    def forward(dy, x, dw_weight, pw_weight, dw_bias, pw_bias, saved, config: Config, mask: int):
        arguments = (*config.arguments(), mask, *config.precision())
        return torch.ops.dsconv_cuda.bwd(dy, x, dw_weight, pw_weight, dw_bias, saved, *arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        dy, *primals, _, ctx.config, ctx.mask = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(dy, *primals)
        ctx.save_for_forward(dy, *primals)

    @staticmethod
    def backward(ctx, *cotangents):
        dy, *primals = ctx.saved_tensors
        cotangents = _asked_for(cotangents, ctx.mask)
        grads = second_order.backward_vjp(dy, primals, cotangents, ctx.config)
        return (
            *(g if needed else None for g, needed in zip(grads, ctx.needs_input_grad, strict=False)),
            None,
            None,
            None,
        )

    @staticmethod
    def jvp(ctx, dy_t, *tangents):
        with _outer_forward_ad(ctx.saved_tensors) as (dy, *primals):
            grads_t = second_order.backward_jvp(dy, dy_t, primals, tangents[:5], ctx.config)
        # PyTorch takes no None here, not even for an output of shape [0].
        return tuple(
            dy.new_zeros(0) if not ctx.mask & bit else torch.zeros_like(primal) if t is None else t
            for t, primal, bit in zip(grads_t, primals, GRAD_BITS, strict=True)
        )

    @staticmethod
    def vmap(info, in_dims, *args):
        return backward_vmap(DepthwiseSeparableGrad.apply, 6, 8)(info, in_dims, *args)


@contextlib.contextmanager
def _outer_forward_ad(saved: tuple):
    """The saved tensors for use in a jvp that is differentiated in forward mode itself, as jacfwd(jacfwd(f)) does.

    PyTorch switches forward mode off around a jvp, because what is saved carries the tangents of the level that the
    jvp serves; so the levels around it would get none, without a word. Here these tangents are taken off and forward
    mode is on.
    """
    primals = [None if t is None else forward_ad.unpack_dual(t).primal for t in saved]
    with forward_ad._set_fwd_grad_enabled(True):
        yield primals


def _asked_for(grads, mask: int) -> tuple:
    return tuple(g if mask & bit else None for g, bit in zip(grads, GRAD_BITS, strict=True))


def _derivatives_may_follow(tensors: tuple) -> bool:
    """Whether a call on `tensors` has to go through a Function."""
    return (
        (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors))
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
    )


def apply_with_graph(*inputs) -> Tensor:
    """Calls the op through the Function for calls outside of torch.func; takes what :func:`apply` takes."""
    result = _DepthwiseSeparableEager.apply(*inputs)
    return result if isinstance(result, Tensor) else result[0]


def apply(
    x: Tensor, dw_weight: Tensor, pw_weight: Tensor, dw_bias: Tensor | None, pw_bias: Tensor | None, config: Config
) -> Tensor:
    """Calls the op, through a Function only where a derivative or a transform may need it."""
    tensors = (x, dw_weight, pw_weight, dw_bias, pw_bias)
    if torch.compiler.is_compiling():
        if torch.onnx.is_in_onnx_export():
            return decompositions.fwd(*tensors, *config.arguments())
        # Graphs hold the bare op; its gradients are registered in ops.py.
        needs_pre = torch.is_grad_enabled() and not derivative_from_output(config.out_act)
        if needs_pre and any(t is not None and t.requires_grad for t in tensors):
            return torch.ops.dsconv_cuda.fwd_with_pre(*tensors, *config.arguments(), *config.precision())[0]
        return torch.ops.dsconv_cuda.fwd(*tensors, *config.arguments(), *config.precision())
    if not _derivatives_may_follow(tensors):
        with torch._C._AutoDispatchBelowAutograd():  # past the op's own gradients, which would find nothing to do
            return torch.ops.dsconv_cuda.fwd(*tensors, *config.arguments(), *config.precision())
    if not torch._C._are_functorch_transforms_active():
        return apply_with_graph(*tensors, config)
    result = DepthwiseSeparable.apply(*tensors, config)
    return result if isinstance(result, Tensor) else result[0]
