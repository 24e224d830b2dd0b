"""bfloat16 on AVX512-BF16, which not every machine with AVX-512 has, and the same without it."""

import pytest
import torch
from oracle import check, check_case
from shapes import GEOMETRIES, LAYERS, MIDDLES, Case, identify

from dsconv_cuda import DepthwiseSeparableConv2d, _loader, depthwise_separable_conv2d

pytestmark = pytest.mark.usefixtures("isa", "dot")

# What fills groups of 32 channels, pairs of channels and pairs of taps, and what does not.
SHAPES = [
    Case(c=1, c_out=1),
    Case(c=31, c_out=33),
    Case(c=32, c_out=32, kernel=(2, 2), padding=(0, 0)),
    Case(c=33, c_out=8, kernel=(1, 2), padding=(0, 0)),
    Case(c=64, c_out=24, kernel=(1, 1), padding=(0, 0)),
    Case(c=65, c_out=65, kernel=(5, 4), stride=(2, 2)),
    Case(c=96, c_out=40, kernel=(4, 9), padding=(3, 8)),
    Case(c=37, c_out=5, kernel=(6, 3), padding=(6, 3)),
    Case(c=35, multiplier=2, c_out=17),
    Case(c=32, multiplier=3, c_out=17),
    Case(n=1, c=600, c_out=70),  # sums in several chains
    *GEOMETRIES,
    *MIDDLES,
    *(case for case in LAYERS if case.kernel != (31, 31)),  # PyTorch's own bfloat16 takes minutes for it
]


@pytest.fixture(params=[True, False], ids=["dot", "float32"])
def dot(request, isa):
    """Whether bfloat16 is multiplied as it is; False only where the kernels can be chosen."""
    library = _loader.load_library().module
    if isa == "avx512-emulated" and request.param:
        yield True
        return
    if isa != "avx512" or library is None or not library.bf16_dot_available():
        pytest.skip("no AVX512-BF16, or no choice")
    library.set_bf16_dot(request.param)
    yield request.param
    library.set_bf16_dot(True)


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("case", SHAPES, ids=identify)
def test_forward_against_the_oracle(case, channels_last, device):
    check_case(case, torch.bfloat16, device, channels_last)


# By panels of channels (csrc/cpu/backward_panels.inl): odd numbers of pixels in a chunk, of chunks and of channels.
PANELS = [
    Case(n=1, c=257, c_out=250, h=7, w=7),
    Case(n=3, c=260, c_out=401, h=11, w=13, activation="silu", out_activation="relu"),
    Case(n=9, c=288, c_out=433, h=9, w=9, stride=(2, 2), out_activation="gelu"),
    Case(n=2, c=256, c_out=33, h=3, w=3),
]


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("case", [*SHAPES, *PANELS], ids=identify)
def test_training_against_the_oracle(case, channels_last, device):
    check_case(case, torch.bfloat16, device, channels_last, backward=True)


def test_a_view_whose_rows_are_not_dense(device):
    x = torch.randn(2, 48, 17, 19, device=device).to(torch.bfloat16).contiguous(memory_format=torch.channels_last)
    weights = [torch.randn(s, device=device).to(torch.bfloat16) for s in ((37, 1, 3, 3), (21, 37), (37,), (21,))]
    check([x[:, 5:42, 2:, 1:-2], *weights], {"padding": (1, 1), "activation": "relu"})


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (5, 1), (3, 2), (2, 1)])
def test_what_is_no_number_reaches_the_outputs_whose_windows_hold_it(kernel, stride, channels_last, value, device):
    """Pairs are filled up with zeros, which a partner that is infinite would turn into NaN."""
    x = torch.ones(1, 33, 9, 9, device=device, dtype=torch.bfloat16)
    x[0, 7, 4, 4] = value
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    weight, pointwise = (torch.ones(s, device=device, dtype=torch.bfloat16) for s in ((33, 1, kernel, kernel), (3, 33)))
    y = depthwise_separable_conv2d(x, weight, pointwise, stride=stride)
    seen = torch.nn.functional.conv2d((x != 1).float(), weight.float(), stride=stride, groups=33).sum(1) > 0
    expected = torch.tensor(value, device=device)
    torch.testing.assert_close(y[0, :, seen[0]], expected.expand(3, int(seen.sum())).to(y.dtype), equal_nan=True)
    assert y[0, :, ~seen[0]].isfinite().all()


@pytest.mark.parametrize("channels_last", [True, False])
def test_the_same_bits_for_any_number_of_threads(channels_last, device):
    case = Case(n=3, c=113, c_out=37, h=23, w=17)
    tensors = case.tensors(torch.bfloat16, device, channels_last)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(depthwise_separable_conv2d(*tensors, **case.kwargs))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("case", [Case(n=3, c=113, c_out=37, h=23, w=17), PANELS[1]], ids=identify)
def test_the_same_gradients_for_any_number_of_threads(case, channels_last, device):
    tensors = case.tensors(torch.bfloat16, device, channels_last, requires_grad=True)
    dy = torch.randn_like(depthwise_separable_conv2d(*tensors, **case.kwargs))
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(torch.autograd.grad(depthwise_separable_conv2d(*tensors, **case.kwargs), tensors, dy))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("c", [33, 320])  # by groups of tiles, and by panels of channels
def test_a_gradient_that_is_no_number_reaches_what_it_reaches_in_stock_modules(c, device):
    """Pairs of pixels and of output channels meet in a product, those without a partner meet zeros."""
    x = torch.rand(1, c, 5, 5, device=device).to(torch.bfloat16).requires_grad_()
    weights = [torch.rand(s, device=device).to(torch.bfloat16).requires_grad_() for s in ((c, 1, 3, 3), (c + 1, c))]
    dy = torch.ones(1, c + 1, 5, 5, device=device, dtype=torch.bfloat16)
    dy[0, c, 4, 4] = float("inf")  # the last channel of the last pixel
    y = depthwise_separable_conv2d(x, *weights, padding=1)
    grad_x, grad_dw, grad_pw = torch.autograd.grad(y, [x, *weights], dy)
    assert grad_pw[:c].isfinite().all()
    assert not grad_pw[c].isfinite().any()
    assert grad_x[0, :, :3].isfinite().all()
    assert not grad_x[0, :, 3:, 3:].isfinite().any()
    assert not grad_dw[:, :, 1, 1].isfinite().any()


def test_a_module_that_keeps_packed_weights_packs_anew_for_the_other_kernels(device):
    library = _loader.load_library().module
    if library is None:
        pytest.skip("no choice")
    module = DepthwiseSeparableConv2d(37, 24, 3, padding=1, bias=True, activation="relu6", dtype=torch.bfloat16)
    x = torch.randn(1, 37, 9, 9).to(torch.bfloat16)
    inputs = (x, x.contiguous(memory_format=torch.channels_last))
    parameters = (module.depthwise.weight, module.pointwise.weight, module.depthwise.bias, module.pointwise.bias)
    with torch.no_grad():
        for switch in (True, False, True):
            library.set_bf16_dot(switch)
            for _ in range(3):
                for given in inputs:
                    expected = depthwise_separable_conv2d(given, *parameters, padding=1, activation="relu6")
                    assert torch.equal(module(given), expected)
