"""The op as a module whose parameters are those of the two nn.Conv2d it replaces."""

from collections.abc import Callable

import torch
from torch import Tensor, fx, nn

from dsconv_cuda import kept_weights, symbolic
from dsconv_cuda.activations import ACTIVATIONS, activation_name
from dsconv_cuda.children import SeparableConvolution, acts, check, compute_weights, only_computes_weights
from dsconv_cuda.functional import (
    depthwise_separable_conv1d,
    depthwise_separable_conv2d,
    depthwise_separable_conv3d,
)


def is_causal(name: str, padding: int | tuple[int, ...] | str, padding_mode: str) -> bool:
    """Whether `padding` is what .depthwise of the module `name` cannot do itself, and has padding 0 in its place."""
    causal = isinstance(padding, str) and padding == "causal"
    if causal and padding_mode != "zeros":
        raise ValueError(f"{name}: padding 'causal' takes padding_mode 'zeros' only, got {padding_mode!r}")
    return causal


def separable_convolutions(
    convolution: type[nn.Module],
    name: str,
    in_channels: int,
    out_channels: int,
    kernel_size: int | tuple[int, ...],
    stride: int | tuple[int, ...],
    padding: int | tuple[int, ...] | str,
    *,
    dilation: int | tuple[int, ...],
    channel_multiplier: int,
    bias: bool,
    padding_mode: str = "zeros",
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> tuple[nn.Module, nn.Module]:
    """The depthwise and the pointwise convolution of the module `name`."""
    if not isinstance(bias, bool):
        raise TypeError(
            f"{name}: bias must be True or False, got {bias!r}; dilation, the sixth argument of nn.Conv2d, is given by "
            f"its name: dilation={bias!r}"
        )
    if channel_multiplier < 1:
        raise ValueError(f"{name}: channel_multiplier must be at least 1, got {channel_multiplier}")
    channels = in_channels * channel_multiplier
    of = {"bias": bias, "device": device, "dtype": dtype}
    depthwise = convolution(
        in_channels,
        channels,
        kernel_size,
        stride,
        padding,
        dilation,
        groups=in_channels,
        padding_mode=padding_mode,
        **of,
    )
    return depthwise, convolution(channels, out_channels, 1, **of)


class _DepthwiseSeparable(SeparableConvolution):
    """What the modules of every rank share: two children, activations, and the way of a call."""

    _convolution: type[nn.Module]
    _operation: Callable[..., Tensor]

    def _forward(self, input: Tensor) -> Tensor:
        depthwise, pointwise, stock = self.depthwise, self.pointwise, self._convolution
        if acts(depthwise, stock) or acts(pointwise, stock):
            if not (only_computes_weights(depthwise, stock) and only_computes_weights(pointwise, stock)):
                return self.one_by_one(input)
            compute_weights(depthwise, pointwise)
        check(self, input, depthwise, pointwise)
        input, padding = self.pad(input)
        return self._operation(
            input,
            depthwise.weight,
            pointwise.weight,
            depthwise.bias,
            pointwise.bias,
            depthwise.stride,
            padding,
            depthwise.dilation,
            self.activation,
            self.out_activation,
        )

    def one_by_one(self, input: Tensor) -> Tensor:
        """By calls of the children."""
        z = ACTIVATIONS[self.activation].value(self.call_depthwise(input))
        return ACTIVATIONS[self.out_activation].value(self.pointwise(z))

    def extra_repr(self) -> str:
        # Sizes are in the repr of the two children.
        return f"activation={self.activation}, out_activation={self.out_activation}"


class _KeepsWeights(kept_weights.Keeper, _DepthwiseSeparable):
    """A module whose next calls are quick (kept_weights.py)."""

    _kept_name = "_kept_call"
    _kept_call: kept_weights.KeptCall | None = None

    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_dynamo_compiling():
            return self._forward(input)
        call = self._kept_call
        if call is not None:
            y = call(self, input)
            if y is not None:
                return y
        if isinstance(input, fx.Proxy):
            return symbolic.record(self, _KeepsWeights, input)
        y = self._forward(input)
        if self._kept_call is None:
            kept_weights.keep(self, input)
        return y


class DepthwiseSeparableConv2d(_KeepsWeights):
    r"""Depthwise separable convolution, fused: see :func:`dsconv_cuda.depthwise_separable_conv2d`.

    Equivalent to::

        depthwise = nn.Conv2d(in_channels, in_channels * channel_multiplier, kernel_size, stride, padding, dilation,
                              groups=in_channels, bias=bias)
        pointwise = nn.Conv2d(in_channels * channel_multiplier, out_channels, 1, bias=bias)
        y = out_activation(pointwise(activation(depthwise(x))))

    ``.depthwise`` and ``.pointwise`` are these two modules. They hold the parameters, so initialisation, state_dict,
    parametrizations and everything else that works on parameters is theirs, and the state_dict is interchangeable with
    that of a plain module with the same two children. Their forward is not called, unless hooks are attached to them or
    one of them has a forward of its own, as a subclass of nn.Conv2d or another module in its place may: then they run
    one after the other as in PyTorch. The hooks with which pruning and the older forms of weight_norm and spectral_norm
    compute a weight run as well, and the result goes into the fused operation. ``in_channels``, ``out_channels``,
    ``kernel_size``, ``stride``, ``padding``, ``dilation`` and ``padding_mode`` are read from the two.

    Args:
        in_channels, out_channels: channels of the input and of the output.
        kernel_size, stride, padding, dilation: of the depthwise part, as in nn.Conv2d; so padding may be "same".
        bias: whether both parts have a bias.
        channel_multiplier: filters per input channel.
        padding_mode: as in nn.Conv2d. What is not zeros is made around the input first, as nn.Conv2d does it, too: in
            the kernels it would cost every load of x a look at a map, and backward a sum over what goes to one pixel,
            while the copy takes a fifth of a forward for reflect and replicate (64 to 128 channels at 56x56: 0.33 ms
            beside 0.27 of zeros, nn.Conv2d twice 0.69; circular 0.52 and 0.89).
        activation, out_activation: after the depthwise and after the pointwise part; a name, None or an instance of the
            matching torch.nn module, of which the name is kept.
        device, dtype: of the parameters.

    Shape: ``[N, in_channels, H, W]`` or ``[in_channels, H, W]`` to ``[N, out_channels, H_out, W_out]``, with the H_out
    and W_out of nn.Conv2d.

    Raises:
        TypeError: a bias that is no bool: the sixth argument of nn.Conv2d is dilation.
        ValueError: a channel_multiplier below 1, an unknown activation, and what nn.Conv2d refuses; at the call, an
            input with other channels than in_channels, and a pointwise child with a stride, a padding or groups.
    """

    _convolution, _operation = nn.Conv2d, staticmethod(depthwise_separable_conv2d)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        bias: bool = False,
        *,
        dilation: int | tuple[int, int] = 1,
        channel_multiplier: int = 1,
        padding_mode: str = "zeros",
        activation: str | nn.Module | None = "identity",
        out_activation: str | nn.Module | None = "identity",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        name = type(self).__name__
        self.activation = activation_name(activation, "activation", name)
        self.out_activation = activation_name(out_activation, "out_activation", name)
        self.depthwise, self.pointwise = separable_convolutions(
            nn.Conv2d,
            name,
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation=dilation,
            channel_multiplier=channel_multiplier,
            bias=bias,
            padding_mode=padding_mode,
            device=device,
            dtype=dtype,
        )


class DepthwiseSeparableConv1d(_KeepsWeights):
    """Depthwise separable convolution along one dimension: see :func:`dsconv_cuda.depthwise_separable_conv1d`.

    ``.depthwise`` and ``.pointwise`` are nn.Conv1d and hold the parameters, as in :class:`DepthwiseSeparableConv2d`.

    Args:
        padding: as in nn.Conv1d, or ``"causal"``: ``dilation * (kernel_size - 1)`` zeros on the left only. The
            depthwise nn.Conv1d has padding 0 then.
        Everything else as in :class:`DepthwiseSeparableConv2d`.

    Shape: ``[N, in_channels, L]`` or ``[in_channels, L]`` to ``[N, out_channels, L_out]``.
    """

    _convolution, _operation = nn.Conv1d, staticmethod(depthwise_separable_conv1d)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int],
        stride: int | tuple[int] = 1,
        padding: int | tuple[int] | str = 0,
        bias: bool = False,
        *,
        dilation: int | tuple[int] = 1,
        channel_multiplier: int = 1,
        padding_mode: str = "zeros",
        activation: str | nn.Module | None = "identity",
        out_activation: str | nn.Module | None = "identity",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        name = type(self).__name__
        self.causal = is_causal(name, padding, padding_mode)
        self.activation = activation_name(activation, "activation", name)
        self.out_activation = activation_name(out_activation, "out_activation", name)
        self.depthwise, self.pointwise = separable_convolutions(
            nn.Conv1d,
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

    def extra_repr(self) -> str:
        return super().extra_repr() + (", padding=causal" if self.causal else "")


class DepthwiseSeparableConv3d(_KeepsWeights):
    """Depthwise separable convolution in three dimensions: see :func:`dsconv_cuda.depthwise_separable_conv3d`.

    ``.depthwise`` and ``.pointwise`` are nn.Conv3d and hold the parameters, as in :class:`DepthwiseSeparableConv2d`.

    Args:
        As in :class:`DepthwiseSeparableConv2d`, with three numbers where that takes two.

    Shape: ``[N, in_channels, D, H, W]`` or ``[in_channels, D, H, W]`` to ``[N, out_channels, D_out, H_out, W_out]``.
    """

    _convolution, _operation = nn.Conv3d, staticmethod(depthwise_separable_conv3d)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int, int],
        stride: int | tuple[int, int, int] = 1,
        padding: int | tuple[int, int, int] | str = 0,
        bias: bool = False,
        *,
        dilation: int | tuple[int, int, int] = 1,
        channel_multiplier: int = 1,
        padding_mode: str = "zeros",
        activation: str | nn.Module | None = "identity",
        out_activation: str | nn.Module | None = "identity",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        name = type(self).__name__
        self.activation = activation_name(activation, "activation", name)
        self.out_activation = activation_name(out_activation, "out_activation", name)
        self.depthwise, self.pointwise = separable_convolutions(
            nn.Conv3d,
            name,
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation=dilation,
            channel_multiplier=channel_multiplier,
            bias=bias,
            padding_mode=padding_mode,
            device=device,
            dtype=dtype,
        )


DepthwiseSeparableConv = DepthwiseSeparableConv2d  # the name under which tutorials know it
