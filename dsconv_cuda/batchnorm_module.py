"""The block dw -> BatchNorm -> act -> pw -> BatchNorm -> act as modules with the children they stand for."""

import torch
from torch import Tensor, nn

from dsconv_cuda import batchnorm_training
from dsconv_cuda.activations import ACTIVATIONS, activation_name
from dsconv_cuda.batchnorm import BatchNormArguments, Unnormalised, block_of_chain
from dsconv_cuda.kept_weights import has_hooks
from dsconv_cuda.modules import _compute_weights, _only_computes_weights, separable_convolutions


class DepthwiseSeparableConvBN(nn.Module):
    """What the blocks of every rank share, which is all but the kinds of their children."""

    _dims: int
    _stock: tuple[type[nn.Module], ...]  # of .depthwise, .bn1, .pointwise and .bn2

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] | str = 0,
        *,
        dilation: int | tuple[int, ...] = 1,
        channel_multiplier: int = 1,
        bias: bool = False,
        activation: str | nn.Module | None = "relu",
        out_activation: str | nn.Module | None = "relu",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        recompute_output: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        name = type(self).__name__
        self.activation = activation_name(activation, "activation", name)
        self.out_activation = activation_name(out_activation, "out_activation", name)
        self.recompute_output = recompute_output
        depthwise, pointwise = separable_convolutions(
            self._stock[0],
            name,
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation=dilation,
            channel_multiplier=channel_multiplier,
            bias=bias,
            device=device,
            dtype=dtype,
        )
        of = {"device": device, "dtype": dtype}
        # In the order of the calls, which that of the parameters follows.
        self.depthwise = depthwise
        self.bn1 = self._stock[1](depthwise.out_channels, eps, momentum, **of)
        self.pointwise = pointwise
        self.bn2 = self._stock[3](out_channels, eps, momentum, **of)

    def forward(self, input: Tensor) -> Tensor:
        return self.forward_in_chain(input)

    def forward_in_chain(self, input: Tensor | Unnormalised, defer: bool = False) -> Tensor | Unnormalised:
        """See :func:`dsconv_cuda.batchnorm.block_of_chain`; input is a Tensor and `defer` False where runs_apart()."""
        hooked = [child for child in self._modules.values() if has_hooks(child)]
        if hooked:
            if not all(map(_only_computes_weights, hooked)):
                return self._one_by_one(input)
            _compute_weights(*hooked)
        padding = self.depthwise.padding
        if self.depthwise.padding_mode != "zeros":
            around = self.depthwise._reversed_padding_repeated_twice
            input, padding = nn.functional.pad(input, around, mode=self.depthwise.padding_mode), 0
        elif not torch.compiler.is_compiling():
            children = self._modules
            modules = children.get("depthwise"), children.get("bn1"), children.get("pointwise"), children.get("bn2")
            if tuple(map(type, modules)) == self._stock:
                arguments = {"recompute_output": self.recompute_output, "defer": defer}
                out = batchnorm_training.step(input, *modules, self.activation, self.out_activation, **arguments)
                if out is not None:
                    return out
        depthwise, pointwise = self.depthwise, self.pointwise
        return block_of_chain(
            self._dims,
            input,
            depthwise.weight,
            pointwise.weight,
            depthwise.bias,
            pointwise.bias,
            self._arguments("bn1"),
            self._arguments("bn2"),
            depthwise.stride,
            padding,
            depthwise.dilation,
            self.activation,
            self.out_activation,
            recompute_output=self.recompute_output,
            defer=defer,
        )

    def runs_apart(self) -> bool:
        """Whether the input has to be a tensor: hooks on a child may see it, or it is padded first."""
        hooked = [child for child in self._modules.values() if has_hooks(child)]
        return self.depthwise.padding_mode != "zeros" or not all(map(_only_computes_weights, hooked))

    def _one_by_one(self, input: Tensor) -> Tensor:
        a = ACTIVATIONS[self.activation].value(self.bn1(self.depthwise(input)))
        return ACTIVATIONS[self.out_activation].value(self.bn2(self.pointwise(a)))

    def _arguments(self, name: str) -> BatchNormArguments | None:
        norm = getattr(self, name)
        if type(norm) is nn.Identity:
            return None
        forward = getattr(type(norm), "forward", None)
        stock = isinstance(norm, self._stock[1]) and forward is self._stock[1].forward
        if not stock and forward is not nn.SyncBatchNorm.forward:
            raise TypeError(
                f"{type(self).__name__}: {name} must be an nn.{self._stock[1].__name__}, an nn.SyncBatchNorm or an "
                f"nn.Identity, or of a subclass with the same forward, got {type(norm).__name__}; for other norms use "
                f"the four modules one after the other"
            )
        return arguments_of(norm, forward is nn.SyncBatchNorm.forward)

    def extra_repr(self) -> str:
        # Sizes are in the repr of the children.
        text = f"activation={self.activation}, out_activation={self.out_activation}"
        return text + (", recompute_output=True" if self.recompute_output else "")


class DepthwiseSeparableConvBN2d(DepthwiseSeparableConvBN):
    r"""The block of MobileNetV1, trained without its intermediate: see
    :func:`dsconv_cuda.depthwise_separable_conv_bn2d`.

    Equivalent to::

        depthwise = nn.Conv2d(in_channels, in_channels * channel_multiplier, kernel_size, stride, padding, dilation,
                              groups=in_channels, bias=bias)
        bn1 = nn.BatchNorm2d(in_channels * channel_multiplier, eps, momentum)
        pointwise = nn.Conv2d(in_channels * channel_multiplier, out_channels, 1, bias=bias)
        bn2 = nn.BatchNorm2d(out_channels, eps, momentum)
        y = out_activation(bn2(pointwise(activation(bn1(depthwise(x))))))

    ``.depthwise``, ``.bn1``, ``.pointwise`` and ``.bn2`` are these four modules. They hold the parameters, the running
    statistics and the choice of train() or eval(), each for itself, so freezing one is ``block.bn1.eval()``; the
    state_dict is interchangeable with that of a plain module with the same children. Their forward is not called,
    unless hooks are attached to them: then they run one after the other as in PyTorch. The hooks with which pruning and
    the older forms of weight_norm and spectral_norm compute a weight are run, and the block stays one. A
    ``padding_mode`` that is set on ``.depthwise`` is made around the input first.

    A norm may be replaced by another ``nn.BatchNorm2d`` (with affine=False or track_running_stats=False too, or of a
    subclass with the same forward), by ``nn.SyncBatchNorm``, so ``nn.SyncBatchNorm.convert_sync_batchnorm(model)``
    works, on the CPU too, and by ``nn.Identity`` for no norm.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, channel_multiplier, bias: as in
            :class:`dsconv_cuda.DepthwiseSeparableConv2d`.
        activation, out_activation: after the first and after the second norm; a name, None or an instance of the
            matching torch.nn module, of which the name is kept.
        eps, momentum: of both norms.
        recompute_output: y before bn2 is computed again in backward, so that training keeps the input alone.
        device, dtype: of the parameters.

    Shape: ``[N, in_channels, H, W]`` to ``[N, out_channels, H_out, W_out]``, with the H_out and W_out of nn.Conv2d.

    Raises:
        TypeError: at the call, a norm of another kind.
        ValueError: a channel_multiplier below 1, an unknown activation, what nn.Conv2d and nn.BatchNorm2d refuse, and
            in training one value per channel, as nn.BatchNorm2d does.
    """

    _dims = 2
    _stock = (nn.Conv2d, nn.BatchNorm2d, nn.Conv2d, nn.BatchNorm2d)


class DepthwiseSeparableConvBN1d(DepthwiseSeparableConvBN):
    """:class:`DepthwiseSeparableConvBN2d` along one dimension, of nn.Conv1d and nn.BatchNorm1d.

    Shape: ``[N, in_channels, L]`` to ``[N, out_channels, L_out]``, with the L_out of nn.Conv1d.
    """

    _dims = 1
    _stock = (nn.Conv1d, nn.BatchNorm1d, nn.Conv1d, nn.BatchNorm1d)


class DepthwiseSeparableConvBN3d(DepthwiseSeparableConvBN):
    """:class:`DepthwiseSeparableConvBN2d` in three dimensions, of nn.Conv3d and nn.BatchNorm3d.

    Shape: ``[N, in_channels, D, H, W]`` to ``[N, out_channels, D_out, H_out, W_out]``, with the sizes of nn.Conv3d.
    """

    _dims = 3
    _stock = (nn.Conv3d, nn.BatchNorm3d, nn.Conv3d, nn.BatchNorm3d)


def arguments_of(norm: nn.Module, synchronised: bool) -> BatchNormArguments:
    """What nn.BatchNorm2d.forward and nn.SyncBatchNorm.forward hand to F.batch_norm."""
    momentum = 0.0 if norm.momentum is None else norm.momentum
    if norm.momentum is None and counts_batches(norm):
        momentum = 1.0 / (float(norm.num_batches_tracked) + 1.0)  # the mean over all batches
    tracks = not norm.training or norm.track_running_stats
    return BatchNormArguments(
        # In eval mode without running statistics the batch's are taken and none are tracked.
        norm.running_mean if tracks else None,
        norm.running_var if tracks else None,
        norm.weight,
        norm.bias,
        takes_batch_statistics(norm),
        momentum,
        norm.eps,
        _process_group(norm) if synchronised and norm.training else None,
        norm.num_batches_tracked if counts_batches(norm) else None,
    )


def takes_batch_statistics(norm: nn.Module) -> bool:
    return norm.training or (norm.running_mean is None and norm.running_var is None)


def counts_batches(norm: nn.Module) -> bool:
    return norm.training and getattr(norm, "track_running_stats", False) and norm.num_batches_tracked is not None


def _process_group(norm: nn.SyncBatchNorm):
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        return None
    return norm.process_group or distributed.group.WORLD
