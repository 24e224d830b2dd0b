"""A gate between the activation and the pointwise part, as of squeeze-excite (arXiv:1709.01507), as a differentiable
function:

    a = act(dw_weight * x + dw_bias), or with a norm that takes statistics of the batch, act(norm(..))
    gate = f(mean of a over the pixels)                 f is the caller's, [N, C * m, 1, 1] to the same
    y = pw_weight . (gate a) + pw_bias

a is made twice in forward and twice in backward, tile by tile; only where caches hold it, the first pass of forward
writes it for the second, which is quicker than to make it again. Backward needs the gradient of the gate before that of
a, so it takes two turns, with autograd's own way through f between them:

    forward     GatedHead: [z_moments ->] gate_means    f    GatedTail: fwd_gated
    backward    GatedTail: bwd_gate                     f    GatedHead: bwd_gated

GatedHead has a second output beside the means, a `carrier` of the shape of y and without memory, which GatedTail takes
only to send the gradient of y there.

Behind a norm that x goes through first (Unnormalised of batchnorm.py) x is made for the length of a forward, and once
more in backward.

Saved for backward: the input, before that norm, the weights, vectors of the channels, and of each image the gate; not
a, which PyTorch keeps before and behind the gate.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from dsconv_cuda import _checks, _loader, flops
from dsconv_cuda.activations import ACTIVATIONS
from dsconv_cuda.batchnorm_autograd import Batch, affine_gradients, once, operation
from dsconv_cuda.deferred import Deferred
from dsconv_cuda.ops import IDENTITY, grad_mask
from dsconv_cuda.second_order import Config

Gate = Callable[[Tensor], Tensor]

_VALUES = {activation.number: activation.value for activation in ACTIVATIONS.values()}
# Bytes of a that go from one pass of forward to the next, as kSharedCacheBytes of csrc/cpu/cpu_plan.h. On the layers of
# EfficientNet-B0, batch 1 and 8, that took 0.69 to 0.94 of the time of making it again.
_MOST_KEPT = 16 << 20
_NO_SECOND = "double backward is not supported through a gate, as of squeeze-excite; use the modules one by one"


def kernels_loaded() -> bool:
    """On the CPU; there are none on CUDA."""
    _loader.load_library()
    return _loader.has_kernel("gate_means", "CPU")


def refused_in_graph() -> bool:
    """Whether this is traced for a graph that cannot hold a gate: those of torch.compile without gradients can."""
    if torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting():
        return torch.is_grad_enabled()
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None


@dataclasses.dataclass
class Call:
    """What is no tensor, and the gate, which GatedTail leaves here for GatedHead."""

    op: str
    dims: int  # of an image, as f is to see it
    config: Config
    y_shape: tuple[int, ...]
    batch: Batch | None  # of the norm before the activation, where that takes statistics of the batch
    centred: bool = False  # a norm that takes statistics of the batch follows, which takes off what pw_bias adds
    in_act: int = IDENTITY  # behind the norm that x goes through first, where there is one
    gate: Tensor | None = None
    made: Tensor | None = None  # x behind that norm, from one turn of backward to the next

    def arguments(self) -> tuple:
        return self.config.arguments()[:4]

    def read(self, x: Tensor, in_vectors: Tensor | None) -> Tensor:
        """x as the convolution takes it."""
        return x if in_vectors is None else torch.ops.dsconv_cuda.norm_act(x, in_vectors, self.in_act)

    def means(self, x, dw_weight, pw_weight, dw_bias, vectors) -> tuple[Tensor, Tensor]:
        """And a, or a tensor without elements."""
        keep = dw_weight.shape[0] == x.shape[1]
        if keep and not torch.compiler.is_compiling():  # a graph is to serve images of any size
            keep = math.prod(self.y_shape[2:]) * self.y_shape[0] * x.shape[1] * x.itemsize <= _MOST_KEPT
        return torch.ops.dsconv_cuda.gate_means(x, dw_weight, pw_weight, dw_bias, vectors, *self.arguments(), keep)

    def refuse_jvp(self):
        raise NotImplementedError(f"{self.op}: forward-mode AD is not supported through a gate, as of squeeze-excite")


def apply(tensors: tuple, affine: tuple, call: Call, f: Gate, in_vectors: Tensor | None = None) -> Tensor:
    """out_act(y) of (x, dw_weight, pw_weight, dw_bias, pw_bias) and the parameters of call.batch. With in_vectors the
    gradient of x is that of what x is behind that norm."""
    x, dw_weight, pw_weight, dw_bias, pw_bias = tensors
    before = (x, dw_weight, dw_bias, *affine)
    given = x.y if type(x) is Deferred else x
    with torch.no_grad():
        made = call.read(given, in_vectors)
    ops, weights, arguments = torch.ops.dsconv_cuda, (made, dw_weight, pw_weight, dw_bias), call.arguments()
    carrier = None
    if torch.compiler.is_compiling():
        vectors = None  # there is no norm that takes statistics without gradients
        means, kept = call.means(*weights, vectors)
    elif _needs_gradient(before):
        means, carrier, vectors, kept = GatedHead.apply(*before, pw_weight, given, in_vectors, made, call)
    else:
        with torch._C._AutoDispatchBelowAutograd():
            vectors = _norm_of_batch(weights, affine, call)
            means, kept = call.means(*weights, vectors)
    shape = (*means.shape, *(1,) * call.dims)
    gate = _checked(f(means.to(given.dtype).reshape(shape)), means, shape, call)
    if torch.compiler.is_compiling():
        return ops.fwd_gated(*weights, pw_bias, gate, vectors, kept, *arguments, call.config.out_act)
    if _needs_gradient((carrier, gate, pw_weight, pw_bias)):
        inputs = (_detached(t) for t in (given, dw_weight, dw_bias))
        y = GatedTail.apply(carrier, gate, pw_weight, pw_bias, *inputs, vectors, in_vectors, kept, made, call)
        return y if call.config.out_act == IDENTITY else _VALUES[call.config.out_act](y)
    with torch._C._AutoDispatchBelowAutograd():
        return ops.fwd_gated(*weights, pw_bias, gate, vectors, kept, *arguments, call.config.out_act)


def of_folded(x: Tensor, depthwise: nn.Module, pointwise: nn.Module, act: str, out_act: str, f: Gate) -> Tensor:
    """apply() with the weights of two convolutions in 2-D or 3-D, of which all has been checked in an earlier call."""
    weights = (depthwise.weight, pointwise.weight, depthwise.bias, pointwise.bias)
    geometry = (depthwise.stride, depthwise.padding, depthwise.dilation)
    call = _call_of(x.shape, weights[0].shape, weights[1].shape, *geometry, act, out_act)
    if torch.is_grad_enabled():
        call = dataclasses.replace(call)  # one that holds a gate of its own
    return apply((x, *weights), (None, None), call, f)


@functools.lru_cache(maxsize=1024)
def _call_of(x_shape, dw_shape, pw_shape, stride, padding, dilation, act: str, out_act: str) -> Call:
    dims = len(dw_shape) - 2
    op = operation(dims)
    padding = _checks.padding(op, padding, dw_shape[2:], stride, dilation)
    extents = _checks.check_extents(op, x_shape, dw_shape, pw_shape, stride, padding, dilation)
    config = Config(stride, padding, dilation, ACTIVATIONS[act].number, ACTIVATIONS[out_act].number)
    return Call(op, dims, config, (x_shape[0], pw_shape[0], *extents), None)


def _needs_gradient(tensors: tuple) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _detached(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.detach()


def _checked(gate: Tensor, means: Tensor, shape: tuple[int, ...], call: Call) -> Tensor:
    """Like the means, from what the caller's f has made."""
    if not isinstance(gate, Tensor):
        raise TypeError(f"{call.op}: the gate must be a tensor, got {type(gate).__name__}")
    try:
        gate = gate.expand(shape)
    except RuntimeError:
        raise ValueError(f"{call.op}: the gate must have shape {list(shape)}, got {list(gate.shape)}") from None
    return gate.reshape(means.shape).to(means.dtype).contiguous()


def _norm_of_batch(weights: tuple, affine: tuple, call: Call) -> Tensor | None:
    """The vectors of the norm between z and the activation, whose running statistics move; None for none."""
    if call.batch is None:
        return None
    return call.batch.vectors(torch.ops.dsconv_cuda.z_moments(*weights, *call.arguments()[:3]), *affine)[0]


class GatedHead(torch.autograd.Function):
    """(means, carrier, vectors of the norm, a where it is kept); the first two have gradients."""

    @staticmethod
    def forward(ctx, x, dw_weight, dw_bias, gamma, beta, pw_weight, given, in_vectors, made, call: Call):
        weights = (made, dw_weight, pw_weight, dw_bias)
        with torch._C._AutoDispatchBelowAutograd():
            vectors = _norm_of_batch(weights, (gamma, beta), call)
            means, kept = call.means(*weights, vectors)
            carrier = made.new_zeros(()).expand(call.y_shape)
        ctx.op, ctx.call, ctx.no_second = call.op, call, _NO_SECOND
        ctx.affine_dtypes = [None if t is None else t.dtype for t in (gamma, beta)]
        ctx.save_for_backward(given, *weights[1:], vectors, in_vectors)
        ctx.mark_non_differentiable(*(t for t in (vectors, kept) if t is not None))
        ctx.set_materialize_grads(False)
        return means, carrier, vectors, kept

    @staticmethod
    def backward(ctx, grad_means, dy, *_):
        if grad_means is None and dy is None:
            return (None,) * 10
        flops.register_in_modes()
        return (*once(_head_gradients, ctx, grad_means, dy), *(None,) * 5)

    @staticmethod
    def jvp(ctx, *tangents):
        ctx.call.refuse_jvp()


def _head_gradients(ctx, grad_means, dy, x, dw_weight, pw_weight, dw_bias, vectors, in_vectors) -> tuple:
    """Of (x, dw_weight, dw_bias, gamma, beta)."""
    call, wanted = ctx.call, ctx.needs_input_grad
    mask = grad_mask(wanted[0], wanted[1], False, wanted[2], False)
    with torch._C._AutoDispatchBelowAutograd():
        x, call.made = call.read(x, in_vectors) if call.made is None else call.made, None
        gate = call.gate
        if gate is None:  # y has not been made
            gate = x.new_zeros((x.shape[0], dw_weight.shape[0]), dtype=_checks.wide_dtype(x.dtype))
        pixels = math.prod(call.y_shape[2:])
        push = torch.zeros_like(gate) if grad_means is None else (grad_means / pixels).contiguous()
        if dy is None:
            dy = x.new_zeros(()).expand(call.y_shape)
        arguments = (dy, x, dw_weight, pw_weight, dw_bias, gate, push, vectors, *call.arguments(), mask)
        grad_x, grad_dw, grad_bias, sums = torch.ops.dsconv_cuda.bwd_gated(*arguments)
    if vectors is not None:  # what a bias adds, the norm after it takes off again
        grad_bias = None if dw_bias is None else torch.zeros_like(dw_bias)
    grads = (grad_x, grad_dw, grad_bias, *affine_gradients(None if vectors is None else sums, *ctx.affine_dtypes))
    return tuple(g if w else None for g, w in zip(grads, wanted, strict=False))


class GatedTail(torch.autograd.Function):
    """y. The gradient of x and of the depthwise weights goes by way of the carrier."""

    @staticmethod
    def forward(
        ctx, carrier, gate, pw_weight, pw_bias, given, dw_weight, dw_bias, vectors, in_vectors, kept, made, call: Call
    ):
        weights = (made, dw_weight, pw_weight, dw_bias)
        with torch._C._AutoDispatchBelowAutograd():
            call.gate = gate.detach()
            arguments = (*weights, pw_bias, gate, vectors, kept, *call.arguments(), IDENTITY)
            y = torch.ops.dsconv_cuda.fwd_gated(*arguments)
        ctx.op, ctx.call, ctx.no_second = call.op, call, _NO_SECOND
        ctx.save_for_backward(given, *weights[1:], gate, vectors, in_vectors)
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx, dy):
        if dy is None:
            return (None,) * 12
        flops.register_in_modes()
        return (*once(_tail_gradients, ctx, dy), *(None,) * 8)

    @staticmethod
    def jvp(ctx, *tangents):
        ctx.call.refuse_jvp()


def _tail_gradients(ctx, dy, x, dw_weight, pw_weight, dw_bias, gate, vectors, in_vectors) -> tuple:
    """Of (carrier, gate, pw_weight, pw_bias)."""
    call, wanted = ctx.call, ctx.needs_input_grad
    grad_gate = grad_pw = grad_bias = None
    with torch._C._AutoDispatchBelowAutograd():
        if wanted[1] or wanted[2]:
            x = call.read(x, in_vectors)
            if in_vectors is not None and wanted[0]:
                call.made = x
            arguments = (dy, x, dw_weight, pw_weight, dw_bias, gate, vectors, *call.arguments())
            grad_pw, grad_gate = torch.ops.dsconv_cuda.bwd_gate(*arguments)
            grad_pw = grad_pw.to(pw_weight.dtype).reshape(pw_weight.shape)
        if wanted[3]:
            grad_bias = dy.new_zeros(dy.shape[1]) if call.centred else dy.sum((0, *range(2, dy.dim())))
    grads = (dy, grad_gate, grad_pw, grad_bias)
    return tuple(g if w else None for g, w in zip(grads, wanted, strict=False))
