"""The block with statistics of the batch in the graphs of torch.compile: one op that dissolves into those of
batchnorm_autograd.py.

``norm_block`` takes what :class:`BatchNormBlock` takes, flat. It is CompositeImplicitAutograd: torch.compile's first
stage keeps it as one node and does not look inside, the second calls the kernel below, and so traces the Function's
forward and backward into one graph of z_moments, fwd_norm, norm_act, bwd_norm and so on, or on the CPU, with two norms,
of train_fwd_in_graph and train_bwd_in_graph, which are these in one call each. That graph keeps for backward what the
Function saves. Statistics over several processes wait for one another and are not part of a graph.

``norm_later`` is the same for NormLater, a norm before a block.

The number of pixels is not among the arguments: in a graph of free sizes it is no number yet, and the ops know it.
"""

import torch
from torch import Tensor

from dsconv_cuda import _loader, graph_ops
from dsconv_cuda.batchnorm_autograd import Batch, BatchNormBlock, Block, norm_later, once, operation, train_mask
from dsconv_cuda.second_order import Config

_SCHEMAS = (
    "norm_later(Tensor y, Tensor? gamma, Tensor? beta, float eps, int act) -> (Tensor, Tensor, Tensor)",
    "norm_block(Tensor x, Tensor dw_weight, Tensor pw_weight, Tensor? dw_bias, Tensor? pw_bias, Tensor? gamma1, "
    "Tensor? beta1, Tensor? gamma2, Tensor? beta2, Tensor? in_vectors, float? eps1, float? eps2, int[2] stride, int[4] "
    "padding, int[2] dilation, int act, int out_act, bool fast, bool recompute, int in_act, bool defer) -> (Tensor, "
    "Tensor, Tensor, Tensor)",
)


def register(fragment: torch.library.Library) -> None:
    for schema in _SCHEMAS:
        fragment.define(schema)
    fragment.impl("norm_block", _norm_block, "CompositeImplicitAutograd")
    fragment.impl("norm_later", _norm_later, "CompositeImplicitAutograd")


def apply(tensors: tuple, block: Block) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """BatchNormBlock.apply of `tensors`, without the counts; what there is not has shape [0]."""
    eps = (None if batch is None else batch.eps for batch in (block.batch1, block.batch2))
    config = block.config
    return torch.ops.dsconv_cuda.norm_block(
        *tensors,
        *eps,
        *config.arguments()[:4],
        block.out_act,
        config.fast,
        block.recompute,
        block.in_act,
        block.defer,
    )


def _norm_block(*arguments):
    tensors, (eps1, eps2, stride, padding, dilation, act, out_act, fast, *rest) = arguments[:10], arguments[10:]
    config = Config(tuple(stride), tuple(padding), tuple(dilation), act, 0, fast)
    # A count of 0: that of the tensors.
    batches = (None if eps is None else Batch(eps, 0, None) for eps in (eps1, eps2))
    block = Block(operation(len(stride)), config, out_act, *batches, *rest)
    if None not in (eps1, eps2) and tensors[0].device.type == "cpu" and graph_ops.recording() and _joined_kernels():
        return BlockInGraph.apply(*tensors, block)
    out, vectors, moments1, _, moments2, _ = BatchNormBlock.apply(*tensors, block)
    none = (out.new_empty(0, dtype=torch.float64) if t is None else t for t in (vectors, moments1, moments2))
    return out, *none


def _joined_kernels() -> bool:
    """Whether the loaded library has them; the CUDA kernels on the host, which tests run, have not."""
    return _loader.has_kernel("train_fwd_in_graph", "CPU")


class BlockInGraph(torch.autograd.Function):
    """BatchNormBlock with both norms, without the counts, in one op each way."""

    @staticmethod
    def forward(ctx, x, dw_weight, pw_weight, dw_bias, pw_bias, gamma1, beta1, gamma2, beta2, in_vectors, block: Block):
        config = block.config
        row = graph_ops.row(*config.arguments()[:4], block.out_act, config.fast)
        with torch._C._AutoDispatchBelowAutograd():
            y, out, vectors1, vectors2, *moments = torch.ops.dsconv_cuda.train_fwd_in_graph(
                x, dw_weight, pw_weight, dw_bias, pw_bias, gamma1, beta1, gamma2, beta2, block.batch1.eps,
                block.batch2.eps, row, in_vectors, block.in_act, block.defer,
            )  # fmt: skip
        ctx.op, ctx.row, ctx.in_act = block.op, row, block.in_act
        ctx.save_for_backward(
            *(x, dw_weight, pw_weight, dw_bias, pw_bias, in_vectors, vectors1, vectors2),
            None if block.recompute and not block.defer else y,
        )
        ctx.mark_non_differentiable(vectors2, *moments)
        ctx.set_materialize_grads(False)
        return y if block.defer else out, vectors2, *moments

    @staticmethod
    def backward(ctx, grad_out, *_):
        if grad_out is None:
            return (None,) * 11
        return (*once(_gradients, ctx, grad_out), None, None)

    jvp = staticmethod(BatchNormBlock.jvp)


def _gradients(ctx, grad_out, *saved) -> tuple:
    """Of (x, dw_weight, pw_weight, dw_bias, pw_bias, gamma1, beta1, gamma2, beta2)."""
    *operands, in_vectors, vectors1, vectors2, y = saved
    with torch._C._AutoDispatchBelowAutograd():
        grads = torch.ops.dsconv_cuda.train_bwd_in_graph(
            grad_out,
            y,
            *operands,
            vectors1,
            vectors2,
            ctx.row,
            train_mask(ctx.needs_input_grad),
            in_vectors,
            ctx.in_act,
        )
    return tuple(grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad, strict=False))


def _norm_later(y, gamma, beta, eps: float, act: int):
    return norm_later(y, gamma, beta, operation(y.dim() - 2), Batch(eps, 0, None), act, None)
