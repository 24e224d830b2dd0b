"""What the op computes, in plain PyTorch: documentation, and the oracle of the tests. Never a fallback."""

import torch.nn.functional as F
from torch import Tensor

from dsconv_cuda.activations import ACTIVATIONS, activation_name


def depthwise_separable_conv2d(
    input: Tensor,
    dw_weight: Tensor,
    pw_weight: Tensor,
    dw_bias: Tensor | None = None,
    pw_bias: Tensor | None = None,
    stride=1,
    padding=0,
    dilation=1,
    activation="identity",
    out_activation="identity",
) -> Tensor:
    """The two convolutions that :func:`dsconv_cuda.depthwise_separable_conv2d` fuses, one after the other."""
    weights = (dw_weight, pw_weight, dw_bias, pw_bias)
    return _two_convolutions(F.conv2d, 2, input, weights, (stride, padding, dilation), activation, out_activation)


def depthwise_separable_conv3d(
    input: Tensor,
    dw_weight: Tensor,
    pw_weight: Tensor,
    dw_bias: Tensor | None = None,
    pw_bias: Tensor | None = None,
    stride=1,
    padding=0,
    dilation=1,
    activation="identity",
    out_activation="identity",
) -> Tensor:
    """The two convolutions that :func:`dsconv_cuda.depthwise_separable_conv3d` fuses, one after the other."""
    weights = (dw_weight, pw_weight, dw_bias, pw_bias)
    return _two_convolutions(F.conv3d, 3, input, weights, (stride, padding, dilation), activation, out_activation)


def _two_convolutions(convolution, dims, input, weights, geometry, activation, out_activation):
    dw_weight, pw_weight, dw_bias, pw_bias = weights
    act = ACTIVATIONS[activation_name(activation)].value
    out_act = ACTIVATIONS[activation_name(out_activation)].value
    z = convolution(input, dw_weight, dw_bias, *geometry, groups=input.size(-1 - dims))
    return out_act(convolution(act(z), pw_weight.view(*pw_weight.shape[:2], *(1,) * dims), pw_bias))
