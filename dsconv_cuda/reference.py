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
    act = ACTIVATIONS[activation_name(activation)].value
    out_act = ACTIVATIONS[activation_name(out_activation)].value
    z = F.conv2d(input, dw_weight, dw_bias, stride, padding, dilation, groups=input.size(-3))
    return out_act(F.conv2d(act(z), pw_weight.view(*pw_weight.shape[:2], 1, 1), pw_bias))


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
    act = ACTIVATIONS[activation_name(activation)].value
    out_act = ACTIVATIONS[activation_name(out_activation)].value
    z = F.conv3d(input, dw_weight, dw_bias, stride, padding, dilation, groups=input.size(-4))
    return out_act(F.conv3d(act(z), pw_weight.view(*pw_weight.shape[:2], 1, 1, 1), pw_bias))
