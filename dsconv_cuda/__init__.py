"""Fused depthwise separable convolutions for PyTorch, on the CPU and on CUDA.

    depthwise_separable_conv2d      the function, and ...conv1d, ...conv3d
    DepthwiseSeparableConv2d        the module, also as DepthwiseSeparableConv, and ...Conv1d, ...Conv3d
    DepthwiseSeparableConvBN2d      the block with a BatchNorm after either part, trained as one, and ...BN1d, ...BN3d;
                                    depthwise_separable_conv_bn2d and BatchNormArguments are its function
    DepthwiseSeparableSequence      a sequence of such blocks that keeps one tensor a block for backward
    fuse, unfuse, explain_fusion    finds the chains of a model of stock modules and fuses them
    clear_weight_cache              drops the packed and folded weights that modules keep
    decomposition_table             the op as two convolutions, for exports to other runtimes
    models                          networks that use it: MobileNetV1, Xception, ExampleNet
    complexity                      multiply-adds, bytes and bounds of layers and models
    plan, gpus, Gpu                 what the planner would run for a call, on a GPU that need not be there
    load                            compiles the library now, with options of your own
    python -m dsconv_cuda.info      what was built and what this machine runs

Importing the package builds and loads nothing; the first call does.
"""

import importlib

from dsconv_cuda import complexity, models
from dsconv_cuda.batchnorm import (
    BatchNormArguments,
    depthwise_separable_conv_bn1d,
    depthwise_separable_conv_bn2d,
    depthwise_separable_conv_bn3d,
)
from dsconv_cuda.batchnorm_module import (
    DepthwiseSeparableConvBN1d,
    DepthwiseSeparableConvBN2d,
    DepthwiseSeparableConvBN3d,
)
from dsconv_cuda.decompositions import decomposition_table
from dsconv_cuda.functional import (
    depthwise_separable_conv1d,
    depthwise_separable_conv2d,
    depthwise_separable_conv3d,
)
from dsconv_cuda.fusion import explain_fusion, fuse, unfuse
from dsconv_cuda.kept_weights import clear_weight_cache
from dsconv_cuda.modules import (
    DepthwiseSeparableConv,
    DepthwiseSeparableConv1d,
    DepthwiseSeparableConv2d,
    DepthwiseSeparableConv3d,
)
from dsconv_cuda.sequence import DepthwiseSeparableSequence

__version__ = "0.1.0"

__all__ = [
    "BatchNormArguments",
    "DepthwiseSeparableConv",
    "DepthwiseSeparableConv1d",
    "DepthwiseSeparableConv2d",
    "DepthwiseSeparableConv3d",
    "DepthwiseSeparableConvBN1d",
    "DepthwiseSeparableConvBN2d",
    "DepthwiseSeparableConvBN3d",
    "DepthwiseSeparableSequence",
    "Gpu",
    "__version__",
    "clear_weight_cache",
    "complexity",
    "decomposition_table",
    "depthwise_separable_conv1d",
    "depthwise_separable_conv2d",
    "depthwise_separable_conv3d",
    "depthwise_separable_conv_bn1d",
    "depthwise_separable_conv_bn2d",
    "depthwise_separable_conv_bn3d",
    "explain_fusion",
    "fuse",
    "gpus",
    "load",
    "models",
    "plan",
    "unfuse",
]


def __getattr__(name: str):
    # Only who compiles by hand needs the build machinery.
    if name == "load":
        return importlib.import_module("dsconv_cuda.jit").load
    if name in ("plan", "gpus", "Gpu"):
        return getattr(importlib.import_module("dsconv_cuda.planning"), name)
    if name in ("jit", "info", "reference"):
        return importlib.import_module(f"dsconv_cuda.{name}")
    raise AttributeError(f"module 'dsconv_cuda' has no attribute {name!r}")


def __dir__():
    return sorted(set(globals()) | set(__all__))
