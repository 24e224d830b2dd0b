"""A convolution, a depthwise separable one and another convolution: the smallest network that uses the op."""

from torch import Tensor, nn

from dsconv_cuda.modules import DepthwiseSeparableConv


class ExampleNet(nn.Module):
    """Conv2d(3, 32) -> DepthwiseSeparableConv(32, 64) -> Conv2d(64, 128), all 3 x 3 with stride 1 and padding 1.

    Shape: ``[N, 3, H, W]`` to ``[N, 128, H, W]``.
    """

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, kernel_size=3, stride=1, padding=1)
        self.dsconv = DepthwiseSeparableConv(32, 64, kernel_size=3, stride=1, padding=1)
        self.conv2 = nn.Conv2d(64, 128, kernel_size=3, stride=1, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.dsconv(self.conv1(x)))
