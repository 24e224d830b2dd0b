"""The op as a differentiable function: one torch.autograd.Function for forward and one for backward.

    functional.py -> apply() -> DepthwiseSeparable -> torch.ops.dsconv_cuda.fwd / fwd_with_pre
                                  | backward
                                  v
                                DepthwiseSeparableGrad -> torch.ops.dsconv_cuda.bwd
                                  | backward, jvp
                                  v
                                second_order.py (stock PyTorch convolutions)

    apply(), kept_weights.py -> KeptFunction: the same for a plain training step, in as little Python as can be

That backward is a Function of its own is what makes double backward, torch.func.grad, hessian and vmap(grad) right: the
ops alone have first-order gradients only. Both are written with setup_context and jvp, as torch.func asks for.

Saved for backward: the input, the weights and the biases; with an out_activation also y, or y before it where its
derivative cannot be told from y. z and act(z) are recomputed.
"""

import contextlib
import functools
import itertools

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from dsconv_cuda import _loader, compiled_weights, decompositions, flops, second_order
from dsconv_cuda.activations import derivative_from_output
from dsconv_cuda.each import backward_each, forward_each
from dsconv_cuda.ops import GRAD_BITS, IDENTITY, asked_for, grad_mask
from dsconv_cuda.second_order import Config
from dsconv_cuda.vmap_rules import backward_vmap, derivatives_may_follow, forward_vmap


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
        flops.register_in_modes()
        *primals, saved = ctx.saved_tensors
        mask = grad_mask(*ctx.needs_input_grad[:5])
        if derivatives_may_follow((dy, *primals)):
            grads = DepthwiseSeparableGrad.apply(dy, *primals, saved, ctx.config, mask)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                grads = DepthwiseSeparableGrad.forward(dy, *primals, saved, ctx.config, mask)
        return (*asked_for(grads, mask), None)

    @staticmethod
    def jvp(ctx, *tangents):
        with _outer_forward_ad(ctx.saved_tensors) as primals:
            tangents = second_order.forward_jvp(primals, tangents[:5], ctx.config)
        return tangents[0] if derivative_from_output(ctx.config.out_act) else tangents

    @staticmethod
    def vmap(info, in_dims, *args):
        return forward_vmap(_bare_where_possible(DepthwiseSeparable), forward_each)(info, in_dims, *args)


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


_is_grad_enabled = torch.is_grad_enabled
_functorch_active = torch._C._are_functorch_transforms_active
_autocast_enabled = torch._C._is_any_autocast_enabled
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_tracer = torch._C._get_tracing_state


def transformed() -> bool:
    """Whether tensors may be something else than they look like: forward-mode AD, torch.func, modes and tracers."""
    return (
        forward_ad._current_level >= 0
        or _functorch_active()
        or _dispatch_modes() > 0
        or _function_modes() > 0
        or _tracer() is not None
    )


def nobody_watches() -> bool:
    """Whether a call is just a call: nothing transforms it, nor does autocast have a say in it."""
    return not _autocast_enabled() and not transformed()


def kept_kernels() -> bool:
    """Whether the loaded library has the ops *_kept; the CUDA kernels on the host, which tests run, have not."""
    return _loader.has_kernel("fwd_kept", "CPU")


_ALL_GRADS = sum(GRAD_BITS)
# ctx.needs_input_grad of a KeptFunction -> grad_mask
_KEPT_MASKS = {(*needed, False): grad_mask(*needed) for needed in itertools.product((False, True), repeat=5)}


class KeptArguments:
    """The arguments that are no tensors, as Config and as one tensor, for calls with weights of these shapes."""

    __slots__ = ("arguments", "backward", "config", "forward", "saves_pre", "saves_y")

    def __init__(self, dw_shape: torch.Size, pw_shape: torch.Size, config: Config):
        ops = torch.ops.dsconv_cuda
        self.config = config
        weights = (torch.empty(1).expand(shape) for shape in (dw_shape, pw_shape))
        self.arguments = ops.keep(*weights, *config.arguments(), False)
        self.saves_pre = not derivative_from_output(config.out_act)
        self.saves_y = not self.saves_pre and config.out_act != IDENTITY
        self.forward = ops.fwd_with_pre_kept.default if self.saves_pre else ops.fwd_kept.default
        self.backward = ops.bwd_kept.default


class KeptFunction(torch.autograd.Function):
    """DepthwiseSeparable for a plain call in eager mode: on the CPU, no forward-mode AD, transform or mode.

    After a layer of some megabytes the processor's caches hold its data, and each line of Python and of the dispatcher
    comes from memory again; so what a training step executes beside the two ops is kept small.
    """

    @staticmethod
    def forward(ctx, x, dw_weight, pw_weight, dw_bias, pw_bias, kept: KeptArguments):
        if kept.saves_pre:
            y, saved = kept.forward(x, dw_weight, pw_weight, dw_bias, pw_bias, kept.arguments)
        else:
            y = kept.forward(x, dw_weight, pw_weight, dw_bias, pw_bias, kept.arguments, 0)
            saved = y if kept.saves_y else None
        ctx.kept = kept
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, dw_weight, pw_weight, dw_bias, pw_bias, saved)
        return y

    @staticmethod
    def backward(ctx, dy):
        kept = ctx.kept
        if (
            type(dy) is not Tensor
            or _is_grad_enabled()
            or _dispatch_modes()
            or _functorch_active()
            or forward_ad._current_level >= 0
        ):
            ctx.config = kept.config
            return DepthwiseSeparable.backward(ctx, dy)
        x, dw_weight, pw_weight, dw_bias, _, saved = ctx.saved_tensors
        mask = _KEPT_MASKS[ctx.needs_input_grad]
        grads = kept.backward(dy, x, dw_weight, pw_weight, dw_bias, saved, kept.arguments, mask)
        if mask != _ALL_GRADS:
            grads = asked_for(grads, mask)
        return (*grads, None)


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
        cotangents = asked_for(cotangents, ctx.mask)
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
        return backward_vmap(_bare_where_possible(DepthwiseSeparableGrad), backward_each, 6, 8)(info, in_dims, *args)


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


def _bare_where_possible(function: type[torch.autograd.Function]):
    """`function`, past autograd where no derivative follows: calls for each element of a batch add up."""

    def call(*args):
        if derivatives_may_follow(tuple(t for t in args if isinstance(t, Tensor))):
            return function.apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return function.forward(*args)

    return call


@functools.lru_cache(maxsize=1024)
def kept_arguments(dw_shape, pw_shape, stride, padding, dilation, act, out_act) -> KeptArguments | None:
    if not kept_kernels():
        return None
    return KeptArguments(dw_shape, pw_shape, Config(stride, padding, dilation, act, out_act))


def _is_plain(tensors: tuple) -> bool:
    return nobody_watches() and all(t is None or (type(t) in (Tensor, nn.Parameter) and t.is_cpu) for t in tensors)


def apply(
    x: Tensor, dw_weight: Tensor, pw_weight: Tensor, dw_bias: Tensor | None, pw_bias: Tensor | None, config: Config
) -> Tensor:
    """Calls the op, through a Function only where a derivative or a transform may need it."""
    tensors = (x, dw_weight, pw_weight, dw_bias, pw_bias)
    compiling = torch.compiler.is_compiling()
    if compiling or _tracer() is not None:
        if torch.onnx.is_in_onnx_export():
            return decompositions.fwd(*tensors, *config.arguments())
        # Graphs hold the bare op, whose gradients are registered in ops.py, and compiled ones what graph_ops.py puts in
        # its place. Those of torch.jit.trace, which checks them against a trace of parameters that need no gradient,
        # hold the same one for all.
        differentiable = (
            compiling and torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
        )
        if differentiable and not derivative_from_output(config.out_act):
            return torch.ops.dsconv_cuda.fwd_with_pre(*tensors, *config.arguments(), *config.precision())[0]
        if compiling and not differentiable and compiled_weights.pay(*tensors[:3]):
            return torch.ops.dsconv_cuda.fwd_packed(*tensors, config.row())
        return torch.ops.dsconv_cuda.fwd(*tensors, *config.arguments(), *config.precision())
    if not derivatives_may_follow(tensors):
        with torch._C._AutoDispatchBelowAutograd():  # past the op's own gradients, which would find nothing to do
            return torch.ops.dsconv_cuda.fwd(*tensors, *config.arguments(), *config.precision())
    if _is_plain(tensors):
        kept = kept_arguments(dw_weight.shape, pw_weight.shape, *config.arguments())
        if kept is not None:
            return KeptFunction.apply(*tensors, kept)
    function = DepthwiseSeparable if _functorch_active() else _DepthwiseSeparableEager
    result = function.apply(*tensors, config)
    return result if isinstance(result, Tensor) else result[0]
