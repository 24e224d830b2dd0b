"""MobileNetV1 (arXiv:1704.04861, table 1): one convolution, thirteen depthwise separable blocks, one linear layer."""

import torch
from torch import Tensor, nn

from dsconv_cuda.batchnorm_module import DepthwiseSeparableConvBN2d as Block
from dsconv_cuda.sequence import DepthwiseSeparableSequence

# Output channels and stride of each block. Table 1 gives the last one stride 2, but its sizes say 1: 7 x 7 both in and
# out.
BLOCKS = (
    (64, 1),
    (128, 2),
    (128, 1),
    (256, 2),
    (256, 1),
    (512, 2),
    *[(512, 1)] * 5,
    (1024, 2),
    (1024, 1),
)


class MobileNetV1(nn.Module):
    """See :func:`mobilenet_v1`."""

    def __init__(self, width_mult: float = 1.0, num_classes: int = 1000):
        super().__init__()
        if width_mult <= 0:
            raise ValueError(f"mobilenet_v1: width_mult must be above 0, got {width_mult}")

        def width(channels: int) -> int:
            return max(1, int(channels * width_mult))

        channels = width(32)
        self.stem = nn.Sequential(
            nn.Conv2d(3, channels, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()
        )
        blocks = []
        for out_channels, stride in BLOCKS:
            blocks.append(Block(channels, width(out_channels), 3, stride, 1))
            channels = width(out_channels)
        self.blocks = DepthwiseSeparableSequence(*blocks)
        self.classifier = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))
        return self.classifier(torch.flatten(nn.functional.adaptive_avg_pool2d(x, 1), 1))


def mobilenet_v1(width_mult: float = 1.0, num_classes: int = 1000) -> MobileNetV1:
    """MobileNetV1 with random weights.

    Args:
        width_mult: alpha of the paper; every layer has so many times the channels of table 1, rounded down.
        num_classes: outputs of the linear layer.

    4.2 million parameters and 569 million multiply-adds at ``[1, 3, 224, 224]`` with width_mult 1.

    Shape: ``[N, 3, H, W]`` to ``[N, num_classes]``; 224 x 224 in the paper, others work.
    """
    return MobileNetV1(width_mult, num_classes)
