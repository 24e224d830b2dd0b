"""The forms split around the library's product of matrices: the pointwise stage of forward and both of stage P.

Which calls the planner splits is in test_plan.py; here all that can be are, forward into groups of as many
images as a test asks for.
"""

import pytest
import torch
from oracle import check, check_case
from shapes import ACTIVATIONS, ALL, Case, identify, thinned

import dsconv_cuda

pytestmark = [
    pytest.mark.usefixtures("isa"),
    pytest.mark.skipif(
        "config.getoption('--backend') != 'emulated'", reason="only the emulation can be asked for the split form"
    ),
]

DTYPES = [torch.float16, torch.bfloat16, torch.float64]
# Around the box of 256 slots and the chunk of 32 channels, and tiles of 128 pixels and 16 channels of double.
EDGES = [
    Case(n=5, c=33, c_out=17, h=7, w=7),
    Case(n=3, c=31, c_out=40, h=14, w=14),
    Case(n=2, c=64, c_out=64, h=16, w=16),
    Case(n=2, c=40, c_out=24, h=17, w=16, kernel=(5, 5), padding=(2, 2)),
    Case(n=3, c=16, c_out=9, h=15, w=13, stride=(2, 2)),
    Case(n=2, c=24, c_out=8, h=13, w=14, kernel=(5, 5), padding=(2, 2), stride=(2, 2)),
    Case(n=2, c=18, c_out=20, h=19, w=18, padding=(2, 2), dilation=(2, 2)),
    Case(n=3, c=10, multiplier=3, c_out=12, h=9, w=8),
    Case(n=2, c=8, c_out=8, h=1, w=300, kernel=(1, 7), padding=(0, 3)),
    Case(n=3, c=8, c_out=8, h=1, w=1, kernel=(1, 1), padding=0),
    Case(n=1, c=40, c_out=16, h=33, w=31, kernel=(11, 11), padding=(5, 5)),
]


@pytest.fixture
def images(monkeypatch):
    """Asks for groups of so many images; 0: for the fused form."""
    return lambda count: monkeypatch.setenv("DSCONV_SPLIT_IMAGES", str(count))


def products_of(call) -> set[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return {event.name for event in profile.events()} & {"aten::linear", "aten::bmm", "aten::mm"}


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=identify)
@pytest.mark.parametrize("case", EDGES, ids=identify)
def test_shapes_around_the_edges_of_boxes_and_groups(case, dtype, channels_last, device, images):
    for count in {1, 2, case.n}:
        images(count)
        check_case(case, dtype, device, channels_last)


@pytest.mark.parametrize("dtype", DTYPES, ids=identify)
@pytest.mark.parametrize("case", EDGES, ids=identify)
def test_backward_around_the_edges_of_boxes(case, dtype, device, images):
    images(1)
    check_case(case, dtype, device, channels_last=True, backward=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=identify)
def test_every_subset_of_the_gradients(dtype, device, images):
    """What is asked for alone is what it is among all, and the library makes what it is there for."""
    images(1)
    x, dw_weight, pw_weight, dy = torch.randn(2, 24, 9, 8), torch.randn(24, 1, 3, 3), torch.randn(20, 24), None
    dy = torch.randn(2, 20, 9, 8).to(device, dtype).to(memory_format=torch.channels_last)
    x = x.to(device, dtype).to(memory_format=torch.channels_last)
    rest = [
        dw_weight.to(device, dtype),
        pw_weight[..., None, None].to(device, dtype),
        torch.randn(24).to(device, dtype),
    ]
    geometry = ([1, 1], [1, 1, 1, 1], [1, 1], 1, 0)

    def gradients(mask):
        return torch.ops.dsconv_cuda.bwd(dy, x, *rest, None, *geometry, mask, False)

    every = gradients(31)
    for mask in range(1, 31):
        found = gradients(mask)
        for bit in range(5):
            assert not mask >> bit & 1 or torch.equal(found[bit], every[bit]), (mask, bit)
    assert products_of(lambda: gradients(4)) == products_of(lambda: gradients(1)) == {"aten::mm"}
    assert not products_of(lambda: gradients(16))


def test_gradients_that_are_no_rows_of_channels_are_made_as_before(device, images):
    images(1)
    for dtype in DTYPES:
        case = Case(n=2, c=16, c_out=8, out_activation="relu")
        tensors = case.tensors(dtype, device, channels_last=True)
        y = dsconv_cuda.depthwise_separable_conv2d(*tensors, **case.kwargs)
        wide = torch.randn(2, 8, 7, 22, device=device, dtype=dtype).to(memory_format=torch.channels_last)
        for dy in (torch.randn_like(y).contiguous(), wide[..., ::2], torch.ones_like(y)[:1, :1, :1, :1].expand_as(y)):
            arguments = (dy, *tensors[:4], y, [1, 1], [1, 1, 1, 1], [1, 1], 2, 1, 31, False)
            found = torch.ops.dsconv_cuda.bwd(*arguments)
            images(0)
            expected = torch.ops.dsconv_cuda.bwd(*arguments)
            images(1)
            assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=identify)
@pytest.mark.parametrize("case", thinned(ALL, 3), ids=identify)
def test_shapes_around_the_tiles_of_the_fused_form(case, dtype, channels_last, device, images):
    images(2)
    check_case(case, dtype, device, channels_last)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=identify)
@pytest.mark.parametrize("size", [(4, 6, 7), (1, 9, 8), (3, 1, 5)], ids=str)
def test_volumes(size, dtype, channels_last, device, images):
    images(2)
    format = torch.channels_last_3d if channels_last else torch.contiguous_format
    x = torch.randn(3, 20, *size, device=device, dtype=dtype).to(memory_format=format)
    tensors = [x, torch.randn(20, 1, 3, 3, 3), torch.randn(12, 20, 1, 1, 1), torch.randn(20), torch.randn(12)]
    tensors = [t.to(device, dtype) for t in tensors]
    check(tensors, {"padding": 1, "activation": "relu"}, op=dsconv_cuda.depthwise_separable_conv3d)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=identify)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_and_biases_with_every_gradient(name, dtype, channels_last, device, images):
    """With gradients forward also writes the value before the activation, where backward needs it."""
    images(2)
    for bias in (True, False):
        case = Case(n=3, c=10, c_out=11, w=6, dw_bias=bias, pw_bias=bias, activation=name, out_activation=name)
        check_case(case, dtype, device, channels_last, backward=True)


def test_layouts_that_differ_before_and_after(device, images):
    """A weight in channels_last makes the output so, whatever x is; a slice of a larger x has strides of its own."""
    images(2)
    for dtype in DTYPES:
        pw_weight = torch.randn(12, 24, 1, 1, device=device, dtype=dtype)
        dw_weight = torch.randn(24, 1, 3, 3, device=device, dtype=dtype).to(memory_format=torch.channels_last)
        for x in (
            torch.randn(5, 24, 9, 8, device=device, dtype=dtype),
            torch.randn(5, 30, 9, 8, device=device, dtype=dtype)[:, 3:27],
            torch.randn(5, 24, 11, 9, device=device, dtype=dtype).to(memory_format=torch.channels_last)[:, :, 1:10, :8],
        ):
            check([x, dw_weight, pw_weight, None, torch.randn(12).to(device, dtype)], {"padding": 1})


@pytest.mark.parametrize("channels_last", [False, True])
def test_it_is_the_library_that_multiplies(channels_last, device, images):
    format = torch.channels_last if channels_last else torch.contiguous_format
    x, dw_weight, pw_weight = torch.randn(3, 8, 5, 5), torch.randn(8, 1, 3, 3), torch.randn(8, 8, 1, 1)

    def products(dtype, count):
        images(count)
        tensors = [t.to(device, dtype).to(memory_format=format) for t in (x, dw_weight, pw_weight)]
        return products_of(lambda: dsconv_cuda.depthwise_separable_conv2d(*tensors, padding=1))

    expected = {"aten::linear" if channels_last else "aten::bmm"}
    for dtype in DTYPES:
        assert expected <= products(dtype, 2)
        assert not products(dtype, 0)
    # float stays fused: torch's switch for TF32 need not be what the op was told.
    assert not products(torch.float32, 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=identify)
def test_the_groups_change_no_bit(dtype, device, images):
    x = torch.randn(5, 16, 7, 7, device=device, dtype=dtype)
    weights = [torch.randn(16, 1, 3, 3, device=device, dtype=dtype), torch.randn(8, 16, 1, 1).to(device, dtype)]
    found = []
    for count in (1, 2, 4, 5):
        images(count)
        found.append(dsconv_cuda.depthwise_separable_conv2d(x, *weights, padding=1, activation="silu"))
    assert all(torch.equal(y, found[0]) for y in found)
