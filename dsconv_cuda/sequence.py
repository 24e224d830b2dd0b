"""A sequence of blocks in which the second norm of one is made by the next, where it reads."""

import dataclasses
import math
from itertools import zip_longest

import torch
from torch import Tensor, fx, nn

from dsconv_cuda import _checks, symbolic
from dsconv_cuda.batchnorm_module import DepthwiseSeparableConvBN
from dsconv_cuda.children import has_hooks
from dsconv_cuda.norms import takes_batch_statistics


class DepthwiseSeparableSequence(nn.Sequential):
    r"""``nn.Sequential`` of blocks, trained with one tensor a block.

    Equivalent to ``nn.Sequential(*blocks)``, with the same names in the state_dict and the same numbers. Between two
    :class:`dsconv_cuda.DepthwiseSeparableConvBN2d` (or ...1d, ...3d) in training,

        u_i = out_act(gamma2 * yhat_i + beta2)

    is neither written nor kept: the depthwise part of block i + 1 makes it of y_i, the pointwise output, as it reads.
    So a block writes y_i, and y_i is all that training keeps for it, beside vectors of the channels; the first input
    and the last output are tensors as ever. Backward makes u_i once more, for as long as it is in block i + 1. On CUDA,
    and for kernels too large for the CPU's (where a window of the depthwise part does not fit the cache), u_i is made
    for the length of one op instead of on reading.

    It goes from one block to the next where the second norm of the one takes statistics of the batch: train() mode, the
    norm there and not frozen, SyncBatchNorm included; the other may have a first norm or none, frozen or not. Blocks
    with hooks, subclasses with a forward of their own, and modules of other kinds, which may stand anywhere in the
    sequence, are called with tensors, as in nn.Sequential; so are all of them in eval mode.

    Args:
        *blocks: modules, or one OrderedDict of them, as nn.Sequential takes.

    Shape: that of the blocks one after the other.

    Errors are those of the blocks; recompute_output of a block counts only where its output is a tensor.
    """

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, fx.Proxy):
            return symbolic.record(self, DepthwiseSeparableSequence, input)
        modules = list(self)
        for module, following in zip_longest(modules, modules[1:]):
            if _can_be_joined(module):
                input = module.forward_in_chain(input, defer=_takes_unnormalised(module, following))
            else:
                input = module(input)
        return input

    def one_by_one(self, input: Tensor) -> Tensor:
        """By calls of the blocks with tensors."""
        return super().forward(input)

    def kept_bytes(self, input_size: tuple[int, ...], dtype: torch.dtype | None = None) -> "KeptBytes":
        """What a training step on an input of this size keeps for backward, counted from the shapes.

        Args:
            input_size: ``(N, C, H, W)``, or with as many extents as the blocks have dimensions.
            dtype: of the input; that of the first block's weights by default.

        Raises:
            TypeError: a module that is no block of DepthwiseSeparableConvBN2d's kind, about which nothing is known.
        """
        op = "DepthwiseSeparableSequence.kept_bytes"
        blocks = list(self)
        for name, block in self.named_children():
            if not isinstance(block, DepthwiseSeparableConvBN):
                raise TypeError(
                    f"{op}: module {name} must be a DepthwiseSeparableConvBN1d, ...2d or ...3d, got "
                    f"{type(block).__name__}; count a sequence of the blocks alone"
                )
        n, _, *extents = input_size
        element = (dtype or blocks[0].depthwise.weight.dtype).itemsize if blocks else 0
        plain = one_by_one = chain = 0
        for block, following in zip_longest(blocks, blocks[1:]):
            depthwise, c_out = block.depthwise, block.pointwise.out_channels
            x = n * depthwise.in_channels * math.prod(extents)
            padding = _checks.padding(op, block.padding, block.kernel_size, block.stride, block.dilation)
            sizes = (n, depthwise.in_channels, *extents), depthwise.weight.shape, block.pointwise.weight.shape
            extents = _checks.check_extents(op, *sizes, depthwise.stride, padding, depthwise.dilation)
            pixels = n * math.prod(extents)
            z, y = pixels * depthwise.out_channels, pixels * c_out
            # conv: x. norm: z. pointwise: a. norm: y. And what the activations need besides their output.
            plain += x + z * _is_norm(block.bn1) + z + y * _is_norm(block.bn2)
            plain += z * _keeps_its_input(block.activation) + y * _keeps_its_input(block.out_activation)
            kept_y = 0 if block.recompute_output else y
            one_by_one += x + kept_y
            if block is blocks[0]:
                chain += x
            chain += y if _takes_unnormalised(block, following) else kept_y + (y if following is not None else 0)
        return KeptBytes(plain * element, one_by_one * element, chain * element)


@dataclasses.dataclass(frozen=True)
class KeptBytes:
    """Bytes that training keeps between forward and backward; parameters and vectors of the channels are not counted.

    Attributes:
        plain: of nn.Conv2d, nn.BatchNorm2d and activations out of place.
        blocks: of the blocks one after the other in an nn.Sequential.
        chain: of the sequence as it is.
    """

    plain: int
    blocks: int
    chain: int


def _is_norm(module: nn.Module) -> bool:
    return type(module) is not nn.Identity


def _keeps_its_input(activation: str) -> bool:
    """Whether PyTorch's activation keeps the tensor before it, beside the one after it that the next module keeps."""
    return activation not in ("identity", "relu", "sigmoid", "tanh")


def _can_be_joined(module: nn.Module) -> bool:
    kind = type(module)
    ours = DepthwiseSeparableConvBN
    return (
        isinstance(module, ours)
        and kind.forward is ours.forward
        and kind.forward_in_chain is ours.forward_in_chain
        and kind.__call__ is nn.Module.__call__
        and "forward" not in vars(module)
        and not has_hooks(module)
        and not module.runs_apart()
    )


def _takes_unnormalised(block: nn.Module, following: nn.Module | None) -> bool:
    return following is not None and _can_be_joined(block) and _can_be_joined(following) and _by_batch(block.bn2)


def _by_batch(norm: nn.Module) -> bool:
    """Whether a norm takes statistics of the batch; whatever is no norm is left to the block to refuse."""
    return isinstance(norm, nn.modules.batchnorm._BatchNorm) and takes_batch_statistics(norm)
