"""Xception (arXiv:1610.02357, figure 5): 34 separable convolutions in twelve residual blocks, and a tail of two.

Its separable convolutions have nothing between the depthwise and the pointwise part (section 4.7 shows that an
activation there makes the network worse), and no bias: BatchNorm follows each.
"""

import torch
from torch import Tensor, nn

from dsconv_cuda.batchnorm_module import DepthwiseSeparableConvBN2d
from dsconv_cuda.sequence import DepthwiseSeparableSequence


def _chain(in_channels: int, widths: tuple[int, ...], relu_last: bool) -> DepthwiseSeparableSequence:
    """Separable convolution -> BatchNorm for each of `widths`, ReLU between them: blocks without a first norm."""
    blocks = []
    for i, out_channels in enumerate(widths):
        out_activation = "relu" if relu_last or i + 1 < len(widths) else "identity"
        kinds = {"activation": "identity", "out_activation": out_activation}
        block = DepthwiseSeparableConvBN2d(in_channels, out_channels, 3, 1, 1, **kinds)
        block.bn1 = nn.Identity()
        blocks.append(block)
        in_channels = out_channels
    return DepthwiseSeparableSequence(*blocks)


class _ReadsOlderNames(nn.Module):
    """Loads what was saved when each separable convolution and each norm stood in an nn.Sequential by itself.

    `older` has for each block of `.chain` the prefixes of its convolutions and of its norm then; the names since are
    ``chain.<i>.depthwise``, ``chain.<i>.pointwise`` and ``chain.<i>.bn2``.
    """

    def __init__(self, older: list[tuple[str, str]]):
        super().__init__()
        self._older = older

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for i, (convolutions, norm) in enumerate(self._older):
            for old, new in ((convolutions, f"chain.{i}."), (norm, f"chain.{i}.bn2.")):
                for key in [key for key in state_dict if key.startswith(prefix + old)]:
                    state_dict[prefix + new + key[len(prefix + old) :]] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)


class XceptionBlock(_ReadsOlderNames):
    """ReLU -> separable convolution -> BatchNorm for each of `widths`, then max pooling where strided, and a shortcut.

    The shortcut is a strided 1x1 convolution with BatchNorm where the size changes, the input itself where not.
    """

    def __init__(self, in_channels: int, widths: tuple[int, ...], strided: bool, relu_first: bool = True):
        first = 1 if relu_first else 0
        super().__init__([(f"layers.{first + 3 * i}.", f"layers.{first + 1 + 3 * i}.") for i in range(len(widths))])
        self.before = nn.ReLU() if relu_first else nn.Identity()
        self.chain = _chain(in_channels, widths, relu_last=False)
        self.after = nn.MaxPool2d(3, stride=2, padding=1) if strided else nn.Identity()
        self.shortcut = nn.Identity()
        if strided:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, widths[-1], 1, stride=2, bias=False), nn.BatchNorm2d(widths[-1])
            )

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.chain(self.before(x))) + self.shortcut(x)


class _Exit(_ReadsOlderNames):
    """The last residual block, and a chain of two behind it, ReLU after each."""

    def __init__(self):
        super().__init__([("1.", "2."), ("4.", "5.")])
        self.block = XceptionBlock(728, (728, 1024), strided=True)
        self.chain = _chain(1024, (1536, 2048), relu_last=True)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for key in [key for key in state_dict if key.startswith(prefix + "0.")]:
            state_dict[prefix + "block." + key[len(prefix) + 2 :]] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: Tensor) -> Tensor:
        return self.chain(self.block(x))


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
        self.exit = _Exit()
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
