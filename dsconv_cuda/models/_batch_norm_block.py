"""depthwise -> BatchNorm -> ReLU -> pointwise -> BatchNorm -> ReLU of stock modules, the block of MobileNetV1."""

from torch import Tensor, nn


class BatchNormBlock(nn.Module):
    """The block, its children named as those of the fused modules are, so that checkpoints are the same."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, padding: int = 0):
        super().__init__()
        self.depthwise = nn.Conv2d(
            in_channels, in_channels, kernel_size, stride, padding, groups=in_channels, bias=False
        )
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.pointwise = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.depthwise(x)).relu()
        return self.bn2(self.pointwise(x)).relu()
