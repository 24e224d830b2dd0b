"""Networks built of the fused module."""

from dsconv_cuda.models.example_net import ExampleNet

__all__ = ["ExampleNet"]
