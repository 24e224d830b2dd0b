"""One measurement task and the least time that a machine could need for it.

    limit = max(FLOPs / FMA peak, least bytes / bandwidth of the cache level that holds them)

FLOPs are two for each multiply-add of the two convolutions. Taps that fall into the padding are not counted, nor are
biases, activations or anything that a method computes again. Training counts three times the forward's FLOPs.

Least bytes: every tensor that goes in or out crosses once, the intermediate never. Forward reads x and the parameters
and writes y. Backward reads x, the weights and dy, and writes the gradient of x and of each parameter.
"""

import math
from dataclasses import dataclass

import torch

import dsconv_cuda

from .layers import Layer

FORWARD = "forward"
TRAINING = "training"
TRAINING_BN = "training_bn"
MODES = (FORWARD, TRAINING, TRAINING_BN)
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class Problem:
    """`forward` is inference with the layer's activations; `training` is forward and backward of the two convolutions
    with their biases, without activations; `training_bn` is that of the block dw -> BatchNorm -> ReLU6 -> pw ->
    BatchNorm -> ReLU6 with statistics of the batch, without biases. Its limit is that of `training`."""

    layer: Layer
    mode: str
    dtype: torch.dtype

    @property
    def activation(self):
        return "identity" if self.mode == TRAINING else "relu6"

    @property
    def out_activation(self):
        return {FORWARD: self.layer.out_activation, TRAINING: "identity", TRAINING_BN: "relu6"}[self.mode]

    @property
    def trains(self):
        return self.mode != FORWARD

    @property
    def flops(self):
        layer = self.layer
        axes = zip(layer.size, layer.out_size, layer.kernel, layer.padding, strict=True)
        taps = math.prod(
            inner_taps(size, size_out, kernel, layer.stride, layer.dilation, padding)
            for size, size_out, kernel, padding in axes
        )
        depthwise = layer.middle_channels * taps
        pointwise = layer.middle_channels * layer.out_channels * layer.out_pixels
        return (1 if self.mode == FORWARD else 3) * 2 * layer.batch * (depthwise + pointwise)

    @property
    def least_bytes(self):
        layer = self.layer
        x = layer.batch * layer.channels * layer.pixels
        y = layer.batch * layer.out_channels * layer.out_pixels
        weights = layer.middle_channels * (layer.taps + layer.out_channels)
        biases = layer.middle_channels + layer.out_channels
        elements = x + weights + biases + y
        if self.trains:
            elements += x + weights + y  # y stands for dy
            elements += x + weights + biases  # their gradients
        return elements * self.dtype.itemsize

    def limit(self, ceilings):
        """(seconds, what bounds them: "FMA" or the memory level)."""
        level = ceilings.level(self.least_bytes)
        bounds = {
            "FMA": self.flops / ceilings.flops(self.dtype),
            level: self.least_bytes / ceilings.bandwidth[level],
        }
        bound = max(bounds, key=bounds.get)
        return bounds[bound], bound

    def plan(self, arch, *, memory_format=torch.channels_last, activation=None, backward=False):
        """What dsconv_cuda.plan() says of the fused op; activation: another than this problem's."""
        layer = self.layer
        return dsconv_cuda.plan(
            (layer.batch, layer.channels, layer.height, layer.width),
            layer.out_channels,
            layer.kernel,
            layer.stride,
            layer.padding,
            layer.dilation,
            layer.multiplier,
            activation=activation or self.activation,
            backward=backward,
            dtype=self.dtype,
            memory_format=memory_format,
            arch=arch,
        )


def inner_taps(size, size_out, kernel, stride, dilation, padding):
    """Of the size_out * kernel taps along one dimension, those that read the image and not its padding."""
    return sum(
        0 <= position * stride - padding + tap * dilation < size
        for position in range(size_out)
        for tap in range(kernel)
    )
