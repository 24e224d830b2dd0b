"""Xception (arXiv:1610.02357, figure 5): 34 separable convolutions in twelve residual blocks, and a tail of two.

Its separable convolutions have nothing between the depthwise and the pointwise part (section 4.7 shows that an
activation there makes the network worse), and no bias: BatchNorm follows each.
"""

import torch
from torch import Tensor, nn

from dsconv_cuda.modules import DepthwiseSeparableConv2d


def _separable(in_channels: int, out_channels: int) -> list[nn.Module]:
    return [DepthwiseSeparableConv2d(in_channels, out_channels, 3, 1, 1), nn.BatchNorm2d(out_channels)]


class XceptionBlock(nn.Module):
    """ReLU -> separable convolution -> BatchNorm for each of `widths`, then max pooling where strided, and a shortcut.

    The shortcut is a strided 1x1 convolution with BatchNorm where the size changes, the input itself where not.
    """

    def __init__(self, in_channels: int, widths: tuple[int, ...], strided: bool, relu_first: bool = True):
        super().__init__()
        layers: list[nn.Module] = []
        channels = in_channels
        for out_channels in widths:
            layers += [nn.ReLU(), *_separable(channels, out_channels)]
            channels = out_channels
        if not relu_first:
            layers = layers[1:]
        if strided:
            layers.append(nn.MaxPool2d(3, stride=2, padding=1))
        self.layers = nn.Sequential(*layers)
        self.shortcut = nn.Identity()
        if strided:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride=2, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) + self.shortcut(x)


class Xception(nn.Module):
    """See :func:`xception`."""

    def __init__(self, num_classes: int = 1000):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 32, 3, stride=2, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
        )
        self.entry = nn.Sequential(
            XceptionBlock(64, (128, 128), strided=True, relu_first=False),
            XceptionBlock(128, (256, 256), strided=True),
            XceptionBlock(256, (728, 728), strided=True),
        )
        self.middle = nn.Sequential(*(XceptionBlock(728, (728, 728, 728), strided=False) for _ in range(8)))
        self.exit = nn.Sequential(
            XceptionBlock(728, (728, 1024), strided=True),
            *_separable(1024, 1536),
            nn.ReLU(),
            *_separable(1536, 2048),
            nn.ReLU(),
        )
        self.classifier = nn.Linear(2048, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_in")

    def forward(self, x: Tensor) -> Tensor:
        x = self.exit(self.middle(self.entry(self.stem(x))))
        return self.classifier(torch.flatten(nn.functional.adaptive_avg_pool2d(x, 1), 1))


def xception(num_classes: int = 1000) -> Xception:
    """Xception with random weights.

    Args:
        num_classes: outputs of the linear layer.

    22.9 million parameters (22,855,952), 8.4 billion multiply-adds at ``[1, 3, 299, 299]``.

    Shape: ``[N, 3, H, W]`` to ``[N, num_classes]``; 299 x 299 in the paper, others work.
    """
    return Xception(num_classes)
