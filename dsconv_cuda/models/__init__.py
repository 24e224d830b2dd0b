"""Networks built of the fused modules: of the papers that made the operation known, and the smallest one."""

from dsconv_cuda.models.example_net import ExampleNet
from dsconv_cuda.models.mobilenet_v1 import MobileNetV1, mobilenet_v1
from dsconv_cuda.models.xception import Xception, xception

__all__ = ["ExampleNet", "MobileNetV1", "Xception", "mobilenet_v1", "xception"]
