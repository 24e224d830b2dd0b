"""The block dw -> BatchNorm -> act -> pw -> BatchNorm -> act as modules with the children they stand for."""

import torch
from torch import Tensor, fx, nn

from dsconv_cuda import batchnorm_training, compiled_folding, symbolic
from dsconv_cuda.activations import ACTIVATIONS, activation_name
from dsconv_cuda.autograd import transformed
from dsconv_cuda.batchnorm import Unnormalised, block_of_chain
from dsconv_cuda.children import SeparableConvolution, acts, check, compute_weights, only_computes_weights
from dsconv_cuda.folded import Folded, wants_gradients
from dsconv_cuda.guards import Guards
from dsconv_cuda.kept_weights import Keeper
from dsconv_cuda.modules import is_causal, separable_convolutions
from dsconv_cuda.norms import BatchNormArguments, arguments_of, takes_batch_statistics

_CONVOLUTIONS = ("depthwise", "pointwise")


class DepthwiseSeparableConvBN(Keeper, SeparableConvolution):
    """What the blocks of every rank share, which is all but the kinds of their children."""

    _dims: int
    _stock: tuple[type[nn.Module], ...]  # of .depthwise, .bn1, .pointwise and .bn2
    _kept_name = "_folded"
    _folded: Folded | None = None

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
        padding_mode: str = "zeros",
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
        if self._dims == 1:
            self.causal = is_causal(name, padding, padding_mode)
        depthwise, pointwise = separable_convolutions(
            self._stock[0],
            name,
            in_channels,
            out_channels,
            kernel_size,
            stride,
            0 if self.causal else padding,
            dilation=dilation,
            channel_multiplier=channel_multiplier,
            bias=bias,
            padding_mode=padding_mode,
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
        if isinstance(input, fx.Proxy):
            return symbolic.record(self, DepthwiseSeparableConvBN, input)
        return self.forward_in_chain(input)

    def forward_in_chain(self, input: Tensor | Unnormalised, defer: bool = False) -> Tensor | Unnormalised:
        """See :func:`dsconv_cuda.batchnorm.block_of_chain`; input is a Tensor and `defer` False where runs_apart()."""
        folded = self._folded
        if folded is not None and not torch.compiler.is_compiling() and self._parts() == folded.made_of:
            out = folded.again(input)
            if out is not None:
                return out
        acting = self._acting()
        if acting:
            if not all(only_computes_weights(*child) for child in acting):
                return self.one_by_one(input)
            compute_weights(*(child for child, _ in acting))
        depthwise, pointwise = self._modules["depthwise"], self._modules["pointwise"]
        check(self, input.y if type(input) is Unnormalised else input, depthwise, pointwise)
        if depthwise.padding_mode == "zeros" and not acting:
            out = self._step(input, defer) if self.bn2.training else None
            if out is None:
                out = self._evaluate(input)
            if out is not None:
                return out
        return self._with_all_checks(*self.pad(input), defer)

    def _acting(self) -> list[tuple[nn.Module, type[nn.Module] | None]]:
        """The children that have to be called, and whose forward each convolution of them should have."""
        acting, convolution = [], self._stock[0]
        for name, child in self._modules.items():
            stock = convolution if name in _CONVOLUTIONS else None
            if acts(child, stock):
                acting.append((child, stock))
        return acting

    def _step(self, input: Tensor | Unnormalised, defer: bool) -> Tensor | Unnormalised | None:
        """A plain training step; None where the call is another."""
        if torch.compiler.is_compiling():
            return None
        children = self._modules
        modules = children.get("depthwise"), children.get("bn1"), children.get("pointwise"), children.get("bn2")
        if tuple(map(type, modules)) != self._stock:
            return None
        arguments = {"causal": self.causal, "recompute_output": self.recompute_output, "defer": defer}
        return batchnorm_training.step(input, *modules, self.activation, self.out_activation, **arguments)

    def _evaluate(self, input: Tensor | Unnormalised) -> Tensor | None:
        """With given statistics in both norms and no gradients of parameters, by folded weights that are kept; None
        where the call is another."""
        depthwise, bn1, _, pointwise, bn2, *_ = parts = self._parts()
        bn1, bn2 = (None if type(norm) is nn.Identity else norm for norm in (bn1, bn2))
        convolution = self._stock[0]
        if type(depthwise) is not convolution or type(pointwise) is not convolution:
            return None
        if not isinstance(input, Tensor) or input.dim() != self._dims + 2:
            return None
        norms = [norm for norm in (bn1, bn2) if norm is not None]
        for norm in norms:
            if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or takes_batch_statistics(norm):
                return None
        modules = (depthwise, pointwise, *norms)
        for module in modules:
            parameters = module._parameters
            if not ("weight" in parameters and "bias" in parameters):
                return None  # parametrized
        if wants_gradients(modules):
            return None
        if torch.compiler.is_compiling():
            if not norms or not compiled_folding.pays(input, depthwise, pointwise, False):
                return None
            arguments = self._arguments("bn1"), self._arguments("bn2"), None
            activations = self.activation, self.out_activation, "identity"
            return compiled_folding.apply(input, depthwise, pointwise, *arguments, *activations, causal=self.causal)
        if transformed():
            return None
        folded = self._folded
        if folded is None or parts != folded.made_of:
            modules = depthwise, bn1, self.activation, pointwise, bn2, self.out_activation
            folded = self._folded = Folded(*modules, causal=self.causal)
            folded.made_of = parts
        return folded(input, self._with_all_checks, lambda: self._guards(norms, (depthwise, pointwise)))

    def _parts(self) -> tuple:
        """What the Folded that is kept was made of."""
        children = self._modules
        return (
            children.get("depthwise"),
            children.get("bn1"),
            self.activation,
            children.get("pointwise"),
            children.get("bn2"),
            self.out_activation,
            self.causal,
        )

    def _guards(self, norms: list[nn.Module], convolutions: tuple[nn.Module, nn.Module]) -> Guards:
        """Of the calls that _evaluate() takes with these parts. Nothing in them leads back to this module, which then
        goes when the last who uses it does."""
        guards = Guards()
        for norm in norms:
            guards.norm(norm)
        for conv in convolutions:
            guards.convolution(conv)
        for child in self._modules.values():
            guards.plain(child)
        return guards

    def _with_all_checks(
        self, input: Tensor | Unnormalised, padding: int | tuple[int, ...] | str | None = None, defer: bool = False
    ) -> Tensor | Unnormalised:
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
            self.padding if padding is None else padding,
            depthwise.dilation,
            self.activation,
            self.out_activation,
            recompute_output=self.recompute_output,
            defer=defer,
        )

    def runs_apart(self) -> bool:
        """Whether the input has to be a tensor: a child is called with it, or it is padded first."""
        whole = all(only_computes_weights(*child) for child in self._acting())
        return self.depthwise.padding_mode != "zeros" or not whole

    def one_by_one(self, input: Tensor) -> Tensor:
        """By calls of the children."""
        a = ACTIVATIONS[self.activation].value(self.bn1(self.call_depthwise(input)))
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
                f"nn.Identity, or of a subclass with the same forward, got {type(norm).__module__}."
                f"{type(norm).__qualname__}; for other norms use "
                f"the four modules one after the other"
            )
        return arguments_of(norm, forward is nn.SyncBatchNorm.forward)

    def extra_repr(self) -> str:
        # Sizes are in the repr of the children.
        text = f"activation={self.activation}, out_activation={self.out_activation}"
        text += ", padding=causal" if self.causal else ""
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
    unless hooks are attached to them or one of them has a forward of its own, as a subclass of nn.Conv2d may: then they
    run one after the other as in PyTorch. The hooks with which pruning and the older forms of weight_norm and
    spectral_norm compute a weight are run, and the block stays one.

    A norm may be replaced by another ``nn.BatchNorm2d`` (with affine=False or track_running_stats=False too, or of a
    subclass with the same forward), by ``nn.SyncBatchNorm``, so ``nn.SyncBatchNorm.convert_sync_batchnorm(model)``
    works, on the CPU too, and by ``nn.Identity`` for no norm.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, channel_multiplier, bias, padding_mode: as in
            :class:`dsconv_cuda.DepthwiseSeparableConv2d`, which has the same attributes, too.
        activation, out_activation: after the first and after the second norm; a name, None or an instance of the
            matching torch.nn module, of which the name is kept.
        eps, momentum: of both norms.
        recompute_output: y before bn2 is computed again in backward, so that training keeps the input alone.
        device, dtype: of the parameters.

    Shape: ``[N, in_channels, H, W]`` to ``[N, out_channels, H_out, W_out]``, with the H_out and W_out of nn.Conv2d.

    Raises:
        TypeError: a bias that is no bool; at the call, a norm of another kind.
        ValueError: a channel_multiplier below 1, an unknown activation, what nn.Conv2d and nn.BatchNorm2d refuse, and
            in training one value per channel, as nn.BatchNorm2d does; at the call, an input with other channels than
            in_channels, and a pointwise child with a stride, a padding or groups.
    """

    _dims = 2
    _stock = (nn.Conv2d, nn.BatchNorm2d, nn.Conv2d, nn.BatchNorm2d)


class DepthwiseSeparableConvBN1d(DepthwiseSeparableConvBN):
    """:class:`DepthwiseSeparableConvBN2d` along one dimension, of nn.Conv1d and nn.BatchNorm1d.

    padding may be ``"causal"`` as in :class:`dsconv_cuda.DepthwiseSeparableConv1d`; ``.depthwise`` has padding 0 then.

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
