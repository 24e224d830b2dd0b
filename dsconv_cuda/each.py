"""Forward and backward of a batch of calls of one shape, with derivatives of any order: what vmap_rules.py makes of a
batch of weights, or of gradients of weights.

    forward_each() -> torch.ops.dsconv_cuda.fwd_each / fwd_with_pre_each, through ForwardEach where a derivative follows
    backward_each() -> torch.ops.dsconv_cuda.bwd_each, through BackwardEach

All tensors have the elements in front. Saved for backward is what autograd.py saves.
"""

import torch
from torch import Tensor

from dsconv_cuda import second_order
from dsconv_cuda.activations import derivative_from_output
from dsconv_cuda.ops import IDENTITY, asked_for, grad_mask
from dsconv_cuda.second_order import Config


def needs_gradient(tensors: tuple) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def forward_each(x, dw_weight, pw_weight, dw_bias, pw_bias, config: Config) -> Tensor | tuple[Tensor, Tensor]:
    """y, or (y, y before out_act) where backward needs that."""
    tensors = (x, dw_weight, pw_weight, dw_bias, pw_bias)
    if needs_gradient(tensors):
        return ForwardEach.apply(*tensors, config)
    ops = torch.ops.dsconv_cuda
    forward = ops.fwd_each if derivative_from_output(config.out_act) else ops.fwd_with_pre_each
    return forward(*tensors, config.row())


def backward_each(dy, x, dw_weight, pw_weight, dw_bias, pw_bias, saved, config: Config, mask: int) -> tuple:
    """The gradients of (x, dw_weight, pw_weight, dw_bias, pw_bias), of shape [elements, 0] where mask does not ask."""
    tensors = (dy, x, dw_weight, pw_weight, dw_bias, pw_bias)
    if needs_gradient(tensors):
        return BackwardEach.apply(*tensors, saved, config, mask)
    return torch.ops.dsconv_cuda.bwd_each(dy, x, dw_weight, pw_weight, dw_bias, saved, config.row(), mask)


class ForwardEach(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dw_weight, pw_weight, dw_bias, pw_bias, config: Config):
        tensors = (x, dw_weight, pw_weight, dw_bias, pw_bias)
        output = forward_each(*tensors, config)
        y, saved = output if isinstance(output, tuple) else (output, output)
        if saved is not y:
            ctx.mark_non_differentiable(saved)
        ctx.config = config
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, None if config.out_act == IDENTITY else saved)
        return output

    @staticmethod
    def backward(ctx, dy, *_):
        if dy is None:
            return (None,) * 6
        mask = grad_mask(*ctx.needs_input_grad[:5])
        return (*asked_for(backward_each(dy, *ctx.saved_tensors, ctx.config, mask), mask), None)


class BackwardEach(torch.autograd.Function):
    """`saved` is a function of the other inputs, so its derivatives count as theirs and it gets none of its own."""

    @staticmethod
    def forward(ctx, dy, x, dw_weight, pw_weight, dw_bias, pw_bias, saved, config: Config, mask: int):
        tensors = (dy, x, dw_weight, pw_weight, dw_bias, pw_bias)
        ctx.config, ctx.mask = config, mask
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        return backward_each(*tensors, saved, config, mask)

    @staticmethod
    def backward(ctx, *cotangents):
        """One element after the other: who asks for the second derivative is rare."""
        tensors, cotangents = ctx.saved_tensors, asked_for(cotangents, ctx.mask)
        elements = []
        for i in range(tensors[0].shape[0]):
            dy, *primals = (None if t is None else t[i] for t in tensors)
            of_element = [None if t is None else t[i] for t in cotangents]
            elements.append(second_order.backward_vjp(dy, primals, of_element, ctx.config))
        grads = (
            torch.stack(of_all) if needed and of_all[0] is not None else None
            for of_all, needed in zip(zip(*elements, strict=True), ctx.needs_input_grad, strict=False)
        )
        return *grads, None, None, None
