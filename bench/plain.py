"""The depthwise-separable convolution written with stock PyTorch modules: what dsconv_cuda is compared with."""

import torch
from torch import nn

from dsconv_cuda.activations import ACTIVATIONS

LAYOUTS = {"channels_last": torch.channels_last, "nchw": torch.contiguous_format}
LAYOUTS_3D = {"channels_last": torch.channels_last_3d, "nchw": torch.contiguous_format}


class PlainSeparableConv2d(nn.Module):
    """out_activation(pointwise(activation(depthwise(x)))), parameters named as in DepthwiseSeparableConv2d."""

    convolution = nn.Conv2d

    def __init__(
        self,
        in_channels,
        out_channels,
        kernel_size,
        stride=1,
        padding=0,
        bias=False,
        *,
        dilation=1,
        channel_multiplier=1,
        activation="identity",
        out_activation="identity",
    ):
        super().__init__()
        middle_channels = in_channels * channel_multiplier
        self.depthwise = self.convolution(
            in_channels, middle_channels, kernel_size, stride, padding, dilation, groups=in_channels, bias=bias
        )
        self.pointwise = self.convolution(middle_channels, out_channels, 1, bias=bias)
        self.activation = ACTIVATIONS[activation].value
        self.out_activation = ACTIVATIONS[out_activation].value

    def forward(self, x):
        return self.out_activation(self.pointwise(self.activation(self.depthwise(x))))


class PlainSeparableConv3d(PlainSeparableConv2d):
    convolution = nn.Conv3d


class PlainSeparableConvBN2d(nn.Module):
    """out_activation(bn2(pointwise(activation(bn1(depthwise(x)))))), children as in DepthwiseSeparableConvBN2d."""

    def __init__(
        self,
        in_channels,
        out_channels,
        kernel_size,
        stride=1,
        padding=0,
        *,
        dilation=1,
        channel_multiplier=1,
        activation="relu",
        out_activation="relu",
    ):
        super().__init__()
        middle = in_channels * channel_multiplier
        self.depthwise = nn.Conv2d(
            in_channels, middle, kernel_size, stride, padding, dilation, groups=in_channels, bias=False
        )
        self.bn1 = nn.BatchNorm2d(middle)
        self.pointwise = nn.Conv2d(middle, out_channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.activation = ACTIVATIONS[activation].value
        self.out_activation = ACTIVATIONS[out_activation].value

    def forward(self, x):
        return self.out_activation(self.bn2(self.pointwise(self.activation(self.bn1(self.depthwise(x))))))
