"""The output against the oracle."""

import pytest
import torch
from oracle import check, check_case
from shapes import ALL, LAYERS, WINDOWS, Case, identify, with_dtype

pytestmark = pytest.mark.usefixtures("isa")


@pytest.mark.parametrize(("case", "dtype", "channels_last"), with_dtype(ALL), ids=identify)
def test_shapes_around_tile_edges(case, dtype, channels_last, device):
    check_case(case, dtype, device, channels_last)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("case", [*LAYERS, *WINDOWS], ids=identify)
def test_layers(case, channels_last, device):
    check_case(case, torch.float32, device, channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=identify)
@pytest.mark.parametrize("c_out", [32, 40])
def test_tensors_that_no_cache_holds(c_out, dtype, device):
    """More than kSharedCacheBytes: x is prefetched, and y written past the caches where its rows are aligned (32)."""
    check_case(Case(n=2, c=32, c_out=c_out, h=256, w=257), dtype, device, channels_last=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=identify)
def test_activations_at_their_kinks(dtype, device):
    """A 1x1 depthwise weight of one hands the kinks themselves to the activations, with a margin of nothing."""
    kinks = torch.tensor([-7.0, -6.0, -3.0, -0.0, 0.0, 3.0, 6.0, 7.0], device=device, dtype=dtype)
    one = torch.ones(1, 1, 1, 1, device=device, dtype=dtype)
    for name in ("relu", "relu6", "leaky_relu", "hardswish", "hardsigmoid"):
        for kwargs in ({"activation": name}, {"out_activation": name}):
            check([kinks.view(1, 1, 1, -1), one, one, None, None], kwargs)


def test_extreme_values_saturate_as_in_pytorch(device):
    """Large, small and infinite values reach the limits that PyTorch's activations have there; NaN stays NaN."""
    from shapes import ACTIVATIONS

    from dsconv_cuda import depthwise_separable_conv2d, reference

    x = torch.tensor(
        [-1e30, -100.0, -20.0, -1e-30, 1e-30, 20.0, 100.0, 1e30, float("inf"), float("nan")], device=device
    )
    one = torch.ones(1, 1, 1, 1, device=device)
    for name in ACTIVATIONS:
        for kwargs in ({"activation": name}, {"out_activation": name}):
            args = (x.view(1, 1, 1, -1), one, one)
            expected = reference.depthwise_separable_conv2d(*args, **kwargs)
            # PyTorch's gelu of infinity is infinity, but NaN in its AVX-512 kernels.
            expected = torch.where(expected.isnan() & ~args[0].isnan(), args[0], expected)
            torch.testing.assert_close(depthwise_separable_conv2d(*args, **kwargs), expected, equal_nan=True)


@pytest.mark.extended
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=identify)
@pytest.mark.parametrize("channels_last", [False, True])
def test_every_size_up_to_a_large_tile(dtype, channels_last, device):
    for size in range(1, 68):
        check_case(Case(n=1, c=size, c_out=68 - size, h=3, w=size), dtype, device, channels_last)
