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

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dsconv_cuda import second_order
from dsconv_cuda.activations import derivative_from_output
from dsconv_cuda.ops import GRAD_BITS, IDENTITY, grad_mask
from dsconv_cuda.second_order import Config


class DepthwiseSeparable(torch.autograd.Function):
    """y, or (y, y before out_act) where backward needs the latter, which is no differentiable output."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, dw_weight, pw_weight, dw_bias, pw_bias, config: Config):
        ops = torch.ops.dsconv_cuda
        forward = ops.fwd if derivative_from_output(config.out_act) else ops.fwd_with_pre
        return forward(x, dw_weight, pw_weight, dw_bias, pw_bias, *config)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *primals, ctx.config = inputs
        saved = None
        if isinstance(output, tuple):
            saved = output[1]
            ctx.mark_non_differentiable(saved)
        elif ctx.config.out_act != IDENTITY:
            saved = output
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*primals, saved)
        ctx.save_for_forward(*primals, saved)

    @staticmethod
    def backward(ctx, dy, *_):
        if dy is None:
            return (None,) * 6
        *primals, saved = ctx.saved_tensors
        mask = grad_mask(*ctx.needs_input_grad[:5])
        grads = DepthwiseSeparableGrad.apply(dy, *primals, saved, ctx.config, mask)
        return (*_asked_for(grads, mask), None)

    @staticmethod
    def jvp(ctx, *tangents):
        *primals, _ = ctx.saved_tensors
        y_t = second_order.forward_jvp(primals, tangents[:5], ctx.config)
        return y_t if derivative_from_output(ctx.config.out_act) else (y_t, None)


class DepthwiseSeparableGrad(torch.autograd.Function):
    """The gradients of (x, dw_weight, pw_weight, dw_bias, pw_bias); one that is not asked for has shape [0].

    `saved` is a function of the other inputs, so its derivatives count as theirs and it gets none of its own.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(dy, x, dw_weight, pw_weight, dw_bias, pw_bias, saved, config: Config, mask: int):
        return torch.ops.dsconv_cuda.bwd(dy, x, dw_weight, pw_weight, dw_bias, saved, *config, mask)

    @staticmethod
    def setup_context(ctx, inputs, output):
        dy, *primals, _, ctx.config, ctx.mask = inputs
        ctx.mark_non_differentiable(*(g for g, bit in zip(output, GRAD_BITS, strict=True) if not ctx.mask & bit))
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
        dy, *primals = ctx.saved_tensors
        grads_t = second_order.backward_jvp(dy, dy_t, primals, tangents[:5], ctx.config)
        # PyTorch takes None for outputs that are not differentiable, and no None for the others.
        grads_t = (
            torch.zeros_like(p) if t is None and p is not None else t for t, p in zip(grads_t, primals, strict=True)
        )
        return _asked_for(grads_t, ctx.mask)


def _asked_for(grads, mask: int) -> tuple:
    return tuple(g if mask & bit else None for g, bit in zip(grads, GRAD_BITS, strict=True))


def apply(
    x: Tensor, dw_weight: Tensor, pw_weight: Tensor, dw_bias: Tensor | None, pw_bias: Tensor | None, config: Config
) -> Tensor:
    """Calls the op, through the Function only where a derivative or a transform may need it."""
    tensors = (x, dw_weight, pw_weight, dw_bias, pw_bias)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if torch.compiler.is_compiling():
        # Graphs hold the bare op; its gradients are registered in ops.py.
        if needs_grad and not derivative_from_output(config.out_act):
            return torch.ops.dsconv_cuda.fwd_with_pre(*tensors, *config)[0]
        return torch.ops.dsconv_cuda.fwd(*tensors, *config)
    if not needs_grad and forward_ad._current_level < 0 and not torch._C._are_functorch_transforms_active():
        # A Function costs some 20 us a call even where nothing is to be differentiated.
        return torch.ops.dsconv_cuda.fwd(*tensors, *config)
    result = DepthwiseSeparable.apply(*tensors, config)
    return result if isinstance(result, Tensor) else result[0]
