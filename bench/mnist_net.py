"""A small MobileNetV1 for 28 x 28 digits, whose separable blocks are of whatever class it is given.

    1 x 28 x 28 -> stem 3x3 -> 24 x 28 x 28 -> five separable blocks -> 192 x 7 x 7 -> mean over the map -> linear -> 10

As in MobileNetV1 (arXiv:1704.04861) the width grows where the map shrinks, and BatchNorm and an activation follow both
convolutions of a block.
"""

from torch import nn

from dsconv_cuda.activations import ACTIVATIONS

STEM_CHANNELS = 24
BLOCKS = ((48, 2), (96, 1), (96, 1), (192, 2), (192, 1))  # (out_channels, stride), each 3x3
CLASSES = 10


class MnistNet(nn.Module):
    """`block` is DepthwiseSeparableConvBN2d or PlainSeparableConvBN2d, `sequence` is nn.Sequential or
    DepthwiseSeparableSequence; the parameters have the same names."""

    def __init__(self, block, activation="relu6", sequence=nn.Sequential):
        super().__init__()
        self.stem = nn.Conv2d(1, STEM_CHANNELS, 3, padding=1)
        self.activation = ACTIVATIONS[activation].value
        blocks, channels = [], STEM_CHANNELS
        for out_channels, stride in BLOCKS:
            blocks.append(
                block(
                    channels,
                    out_channels,
                    3,
                    stride=stride,
                    padding=1,
                    activation=activation,
                    out_activation=activation,
                )
            )
            channels = out_channels
        self.blocks = sequence(*blocks)
        self.classifier = nn.Linear(channels, CLASSES)
        self.apply(_draw_weights)

    def forward(self, images):
        features = self.blocks(self.activation(self.stem(images)))
        return self.classifier(features.mean((2, 3)))


def _draw_weights(module):
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
