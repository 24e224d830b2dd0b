"""The block with statistics of the batch in the graphs of torch.compile: one op that dissolves into those of
batchnorm_autograd.py.

``norm_block`` takes what :class:`BatchNormBlock` takes, flat. It is CompositeImplicitAutograd: torch.compile's first
stage keeps it as one node and does not look inside, the second calls the kernel below, and so traces the Function's
forward and backward into one graph of z_moments, fwd_norm, norm_act, bwd_norm and so on. That graph keeps for backward
what the Function saves. Statistics over several processes wait for one another and are not part of a graph.

``norm_later`` is the same for NormLater, a norm before a block.

The number of pixels is not among the arguments: in a graph of free sizes it is no number yet, and the ops know it.
"""

import torch
from torch import Tensor

from dsconv_cuda.batchnorm_autograd import Batch, BatchNormBlock, Block, norm_later, operation
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
    out, vectors, moments1, _, moments2, _ = BatchNormBlock.apply(*tensors, block)
    none = (out.new_empty(0, dtype=torch.float64) if t is None else t for t in (vectors, moments1, moments2))
    return out, *none


def _norm_later(y, gamma, beta, eps: float, act: int):
    return norm_later(y, gamma, beta, operation(y.dim() - 2), Batch(eps, 0, None), act, None)
