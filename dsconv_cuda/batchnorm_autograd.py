"""The block dw -> BatchNorm -> act -> pw -> BatchNorm -> act with statistics of the batch, as an autograd Function.

The steps are ops of their own (csrc/op_cpu_norm.cpp), so that statistics can be reduced over processes between them:

    forward     z_moments -> fwd_norm -> norm_act
    backward    norm_act_sums -> bwd_norm, or bwd_norm_pointwise -> bwd_norm_depthwise

Per-channel values go between them in float64. In a chain norm_act is left out: the next block gets y, and its ops take
it through the norm and the activation as they read it.
"""

import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from dsconv_cuda import flops
from dsconv_cuda.deferred import Deferred
from dsconv_cuda.ops import IDENTITY, grad_mask
from dsconv_cuda.second_order import Config


def operation(dims: int) -> str:
    """The name of the public function of so many dimensions."""
    return f"depthwise_separable_conv_bn{dims}d"


@functools.cache
def train_mask(needed: tuple) -> int:
    """The grad_mask of train_bwd; every input has a bit, those after the ninth never need a gradient."""
    return sum(1 << i for i, wanted in enumerate(needed) if wanted)


# ---- statistics ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Batch:
    """A norm that takes statistics of the batch: of `count` values a channel here, and of what `group` has beside.

    track(moments, count) is told them in forward, before anything is saved for backward: there checkpointing may end a
    forward that it makes again.
    """

    eps: float
    count: int
    group: object | None
    track: Callable[[Tensor, float], None] | None = None

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

    def vectors(self, moments: Tensor, gamma: Tensor | None, beta: Tensor | None) -> tuple[Tensor, Tensor, float]:
        """Those of ``torch.ops.dsconv_cuda.norm_vectors``, from the moments here; and what join_moments() made of them,
        which track() has been told."""
        moments, count = self.join_moments(moments)
        if self.track is not None:
            self.track(moments, count)
        return torch.ops.dsconv_cuda.norm_vectors(moments, gamma, beta, self.eps), moments, count

    def join_sums(self, sums: Tensor) -> Tensor:
        if not self.is_shared():
            return sums
        sums = sums.clone()
        torch.distributed.all_reduce(sums, group=self.group)
        return sums


# ---- the block as a differentiable function --------------------------------------------------------------------------


@dataclasses.dataclass
class Block:
    """The arguments of a block that are no tensors; batch1 and batch2 are None for no norm.

    With `defer` the output is y, not yet through the second norm and out_act; with in_vectors x is such a y, of which
    in_act follows the norm. `op` is what messages call it.
    """

    op: str
    config: Config
    out_act: int
    batch1: Batch | None
    batch2: Batch | None
    recompute: bool
    in_act: int
    defer: bool


def _vectors_of_no_norm(channels: int, like: Tensor) -> Tensor:
    vectors = torch.zeros(4, channels, dtype=torch.float64, device=like.device)
    vectors[1:3] = 1
    return vectors


def _make_y(weights: tuple, vectors1, block: Block, in_norm: tuple, want_moments: bool) -> tuple[Tensor, Tensor | None]:
    """y of (x, dw_weight, pw_weight, dw_bias, pw_bias), and its moments where they are asked for."""
    ops, precision = torch.ops.dsconv_cuda, block.config.precision()
    if vectors1 is not None:
        return ops.fwd_norm(*weights, vectors1, *block.config.arguments()[:4], want_moments, *in_norm, *precision)
    y = ops.fwd(*weights, *block.config.arguments(), *precision)
    return y, ops.moments(y) if want_moments else None


class BatchNormBlock(torch.autograd.Function):
    """(out, vectors of the second norm, moments and count of the first, those of the second); only out has a gradient,
    which with `defer` is that of the value behind the norm and out_act."""

    @staticmethod
    def forward(ctx, x, dw_weight, pw_weight, dw_bias, pw_bias, gamma1, beta1, gamma2, beta2, in_vectors, block: Block):
        ops, config = torch.ops.dsconv_cuda, block.config
        if type(x) is Deferred:
            x = x.y
        weights, in_norm = (x, dw_weight, pw_weight, dw_bias, pw_bias), (in_vectors, block.in_act)
        vectors1 = vectors2 = moments1 = moments2 = None
        count1 = count2 = 0.0
        with torch._C._AutoDispatchBelowAutograd():
            if block.batch1 is not None:
                moments1 = ops.z_moments(*weights[:4], *config.arguments()[:3], *in_norm)
                vectors1, moments1, count1 = block.batch1.vectors(moments1, gamma1, beta1)
            elif in_vectors is not None:  # only the ops with a norm after z read x through the one before it
                vectors1 = _vectors_of_no_norm(dw_weight.shape[0], dw_weight)
            y, moments2 = _make_y(weights, vectors1, block, in_norm, block.batch2 is not None)
            if block.batch2 is not None:
                vectors2, moments2, count2 = block.batch2.vectors(moments2, gamma2, beta2)
            else:
                moments2 = None
                if block.out_act != IDENTITY:
                    vectors2 = _vectors_of_no_norm(y.shape[1], y)
            out = y if vectors2 is None or block.defer else ops.norm_act(y, vectors2, block.out_act)
        ctx.op, ctx.block, ctx.count1, ctx.count2 = block.op, block, count1, count2
        kept_y = None if vectors2 is None or (block.recompute and not block.defer) else y
        ctx.save_for_backward(*weights, in_vectors, vectors1, vectors2, kept_y)
        ctx.affine_dtypes = [None if t is None else t.dtype for t in (gamma1, beta1, gamma2, beta2)]
        ctx.mark_non_differentiable(*(t for t in (vectors2, moments1, moments2) if t is not None))
        ctx.set_materialize_grads(False)
        return out, vectors2, moments1, count1, moments2, count2

    @staticmethod
    def backward(ctx, grad_out, *_):
        if grad_out is None:
            return (None,) * 11
        flops.register_in_modes()
        return (*once(_gradients, ctx, grad_out), None, None)

    @staticmethod
    def jvp(ctx, *tangents):
        raise NotImplementedError(
            f"{ctx.op}: forward-mode AD is not supported where a norm takes statistics of the batch; use "
            f"backward mode, or put the norms into eval mode"
        )


class NormLater(torch.autograd.Function):
    """The norm with statistics of the batch, `vectors`, of a y that a block takes through it as it reads: a Deferred of
    `owner`, or in graphs, where that is None, y.

    The gradient that comes back is that of the value behind the norm and `act`, as in a chain of blocks.
    """

    @staticmethod
    def forward(ctx, y, gamma, beta, vectors, op: str, batch: Batch, count: float, act: int, owner):
        _remember(ctx, y, gamma, beta, vectors, op, batch, count, act)
        if owner is None:
            return y.view_as(y)
        later = NormLater, (y, gamma, beta, vectors, op, batch, count)
        return Deferred(y, vectors, act, owner, later=later)

    @staticmethod
    def backward(ctx, grad):
        if grad is None:
            return (None,) * 9
        return (*once(_norm_gradients, ctx, grad), *(None,) * 6)

    jvp = staticmethod(BatchNormBlock.jvp)


def _remember(ctx, y, gamma, beta, vectors, op: str, batch: Batch, count: float, act: int) -> None:
    """For _norm_gradients()."""
    ctx.op, ctx.act, ctx.batch, ctx.count = op, act, batch, count
    ctx.save_for_backward(y, vectors)
    ctx.affine_dtypes = [None if t is None else t.dtype for t in (gamma, beta)]
    ctx.set_materialize_grads(False)


def _norm_gradients(ctx, grad, y, vectors) -> tuple:
    """Of (y, gamma, beta)."""
    ops = torch.ops.dsconv_cuda
    with torch._C._AutoDispatchBelowAutograd():
        sums = ops.norm_act_sums(grad, y, vectors, ctx.act)
        grad_y = None
        if ctx.needs_input_grad[0]:
            grad_y = ops.norm_act_grad(grad, y, vectors, ctx.batch.join_sums(sums), ctx.count, ctx.act)
    affine = affine_gradients(sums, *ctx.affine_dtypes)
    return tuple(g if w else None for g, w in zip((grad_y, *affine), ctx.needs_input_grad, strict=False))


class NormNow(torch.autograd.Function):
    """The same norm and `act` where their value itself is wanted."""

    @staticmethod
    def forward(ctx, y, gamma, beta, vectors, op: str, batch: Batch, count: float, act: int):
        _remember(ctx, y, gamma, beta, vectors, op, batch, count, act)
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.dsconv_cuda.norm_act(y, vectors, act)

    @staticmethod
    def backward(ctx, grad):
        if grad is None:
            return (None,) * 8
        return (*once(_norm_gradients, ctx, grad), *(None,) * 5)

    jvp = staticmethod(BatchNormBlock.jvp)


def norm_later(y: Tensor, gamma: Tensor | None, beta: Tensor | None, op: str, batch: Batch, act: int, owner) -> tuple:
    """What NormLater returns, the vectors, and the moments, which are tracked if `batch` says so."""
    vectors, moments, count = _vectors_of_batch(y, gamma, beta, batch)
    return NormLater.apply(y, gamma, beta, vectors, op, batch, count, act, owner), vectors, moments


def norm_now(y: Tensor, gamma: Tensor | None, beta: Tensor | None, op: str, batch: Batch, act: int) -> Tensor:
    """act(F.batch_norm(y, ..)) with statistics of the batch, which are tracked if `batch` says so."""
    vectors, _, count = _vectors_of_batch(y, gamma, beta, batch)
    return NormNow.apply(y, gamma, beta, vectors, op, batch, count, act)


def _vectors_of_batch(y: Tensor, gamma: Tensor | None, beta: Tensor | None, batch: Batch) -> tuple:
    with torch._C._AutoDispatchBelowAutograd():
        return batch.vectors(torch.ops.dsconv_cuda.moments(y), gamma, beta)


def once(gradients: Callable, ctx, *grads) -> tuple:
    """gradients(ctx, *grads, *saved), not differentiable again."""
    if torch.is_grad_enabled():
        return _FirstDerivative.apply(gradients, ctx, *grads, *ctx.saved_tensors)
    return gradients(ctx, *grads, *ctx.saved_tensors)


_NO_SECOND = (
    "double backward is not supported where a norm takes statistics of the batch; put the norms into eval mode, whose "
    "derivatives of any order are right, or use nn.Conv2d and nn.BatchNorm2d for this loss"
)


class _FirstDerivative(torch.autograd.Function):
    """`gradients` of a Function under create_graph: a graph that says in its own backward that there is no second."""

    @staticmethod
    def forward(ctx, gradients: Callable, of, *arguments):
        ctx.message = f"{of.op}: {getattr(of, 'no_second', _NO_SECOND)}"
        return gradients(of, *arguments)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(ctx.message)


def affine_gradients(sums: Tensor | None, gamma_dtype, beta_dtype) -> tuple:
    """Of (gamma, beta), from the sums of the gradient and of it times vhat; a dtype is None where there is none."""
    dtype = gamma_dtype or beta_dtype
    if sums is None or dtype is None:
        return None, None
    beta, gamma = sums.to(dtype).unbind(0)  # there is one dtype for both
    return (None if gamma_dtype is None else gamma), (None if beta_dtype is None else beta)


def _gradients(ctx, grad_out, x, dw_weight, pw_weight, dw_bias, pw_bias, in_vectors, vectors1, vectors2, y) -> tuple:
    """Of (x, dw_weight, pw_weight, dw_bias, pw_bias, gamma1, beta1, gamma2, beta2)."""
    ops, block, config = torch.ops.dsconv_cuda, ctx.block, ctx.block.config
    wanted = ctx.needs_input_grad
    weights = (x, dw_weight, pw_weight, dw_bias)
    geometry, precision, in_norm = config.arguments()[:3], config.precision(), (in_vectors, block.in_act)
    sums1 = sums2 = joined2 = None
    grad_b1 = None
    # What a bias adds, the norm after it takes off again.
    mask = grad_mask(*wanted[:3], wanted[3] and vectors1 is None, wanted[4] and block.batch2 is None)
    with torch._C._AutoDispatchBelowAutograd():
        if vectors2 is not None:
            if y is None:
                y, _ = _make_y((*weights, pw_bias), vectors1, block, in_norm, False)
            if block.batch2 is not None:
                sums2 = ops.norm_act_sums(grad_out, y, vectors2, block.out_act)
                joined2 = block.batch2.join_sums(sums2)
        through_norm2 = (vectors2, joined2, ctx.count2)
        if vectors1 is None:
            dy = ops.norm_act_grad(grad_out, y, *through_norm2, block.out_act)
            arguments = (dy, *weights, None, *config.arguments(), mask, *precision)
            grad_x, grad_dw, grad_pw, grad_b1, grad_b2 = ops.bwd(*arguments)
        else:
            arguments = (grad_out, y, *weights, vectors1, *through_norm2, *geometry, config.act, block.out_act)
            arguments += (mask, *in_norm, *precision)
            if block.batch1 is None:  # dz is du: nothing of its sums
                du, sums, grad_pw, grad_b2 = ops.bwd_norm_pointwise(*arguments)
                nothing = torch.zeros_like(sums)
                grad_x, grad_dw = ops.bwd_norm_depthwise(
                    du, *weights, vectors1, nothing, 1.0, *geometry, mask, *in_norm
                )
                grad_b1 = sums[0].to(x.dtype)
            elif block.batch1.is_shared():
                du, sums1, grad_pw, grad_b2 = ops.bwd_norm_pointwise(*arguments)
                shared = block.batch1.join_sums(sums1)
                grad_x, grad_dw = ops.bwd_norm_depthwise(
                    du, *weights, vectors1, shared, ctx.count1, *geometry, mask, *in_norm
                )
            else:
                grad_x, grad_dw, grad_pw, grad_b2, sums1 = ops.bwd_norm(*arguments)
    if wanted[3] and block.batch1 is not None:
        grad_b1 = torch.zeros_like(dw_bias)
    if wanted[4] and block.batch2 is not None:
        grad_b2 = torch.zeros_like(pw_bias)
    affine = (*affine_gradients(sums1, *ctx.affine_dtypes[:2]), *affine_gradients(sums2, *ctx.affine_dtypes[2:]))
    grads = (grad_x, grad_dw, grad_pw, grad_b1, grad_b2, *affine)
    return tuple(g if w else None for g, w in zip(grads, wanted, strict=False))
