"""3-D convolutions against PyTorch's own: values and gradients, memory formats, transforms, the module, errors."""

import copy
import pickle
from dataclasses import dataclass, replace

import pytest
import torch
from oracle import check
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

from dsconv_cuda import (
    DepthwiseSeparableConv3d,
    _loader,
    decomposition_table,
    depthwise_separable_conv2d,
    depthwise_separable_conv3d,
    ops,
    reference,
)
from dsconv_cuda.activations import ACTIVATIONS

pytestmark = pytest.mark.usefixtures("isa")


@dataclass(frozen=True)
class Volume:
    n: int = 2
    c: int = 5
    multiplier: int = 1
    c_out: int = 7
    size: tuple = (4, 7, 11)
    kernel: tuple = (3, 3, 3)
    stride: tuple = (1, 1, 1)
    padding: tuple | str = (1, 1, 1)
    dilation: tuple = (1, 1, 1)
    activation: str = "relu6"
    out_activation: str = "identity"

    def __str__(self):
        default = Volume()
        fields = {name: value for name, value in vars(self).items() if value != getattr(default, name)}
        return ",".join(f"{name}={value}".replace(" ", "") for name, value in fields.items()) or "default"

    @property
    def kwargs(self) -> dict:
        return {n: getattr(self, n) for n in ("stride", "padding", "dilation", "activation", "out_activation")}

    def tensors(self, dtype=torch.float32, device="cpu", channels_last=False, requires_grad=False) -> list:
        c_mid = self.c * self.multiplier
        shapes = ((self.n, self.c, *self.size), (c_mid, 1, *self.kernel), (self.c_out, c_mid, 1, 1, 1), (c_mid,))
        tensors = [torch.randn(shape).to(device, dtype) for shape in (*shapes, (self.c_out,))]
        if channels_last:
            tensors[0] = tensors[0].contiguous(memory_format=torch.channels_last_3d)
        return [t.requires_grad_() for t in tensors] if requires_grad else tensors


GEOMETRIES = [
    Volume(kernel=kernel, stride=stride, padding=padding, dilation=dilation, size=(5, 6, 7))
    for kernel, stride, padding, dilation in (
        ((1, 1, 1), (1, 1, 1), (0, 0, 0), (1, 1, 1)),
        ((3, 3, 3), (1, 2, 2), (1, 1, 1), (1, 1, 1)),  # X3D
        ((3, 3, 3), (2, 2, 2), (1, 1, 1), (1, 1, 1)),
        ((3, 3, 3), (2, 1, 1), (0, 1, 1), (1, 1, 1)),
        ((3, 3, 3), (3, 4, 2), (2, 2, 2), (1, 1, 1)),
        ((3, 5, 5), (1, 1, 1), (1, 2, 2), (1, 1, 1)),
        ((5, 1, 1), (1, 1, 1), (2, 0, 0), (1, 1, 1)),  # along the depth only
        ((1, 3, 3), (1, 1, 1), (0, 1, 1), (1, 1, 1)),  # slice by slice
        ((1, 3, 3), (2, 1, 1), (3, 1, 1), (1, 1, 1)),  # slices of padding alone
        ((2, 4, 3), (1, 1, 1), "same", (2, 1, 3)),
        ((3, 2, 2), (2, 3, 1), (2, 1, 0), (2, 2, 1)),
        ((3, 3, 3), (1, 1, 1), (5, 1, 1), (1, 1, 1)),
        ((5, 6, 7), (1, 1, 1), (0, 0, 0), (1, 1, 1)),  # one output
    )
]
SHAPES = [
    *GEOMETRIES,
    # Around the edges of vectors, of groups of pixels and of tiles.
    *(Volume(c=c, c_out=80 - c, size=(3, 3, w)) for c, w in ((1, 7), (15, 8), (16, 1), (17, 6), (33, 15), (64, 14))),
    Volume(size=(1, 8, 9)),
    Volume(size=(1, 8, 9), padding=(3, 1, 1)),
    Volume(size=(9, 1, 1)),
    Volume(c=3, multiplier=2, stride=(2, 1, 2)),
    Volume(c=9, multiplier=3),
    Volume(n=1, c=24, c_out=40, size=(6, 14, 14), stride=(1, 2, 2)),
    Volume(n=1, c=300, c_out=400, size=(3, 4, 4)),  # backward by panels of channels
    Volume(n=3, c=260, c_out=300, size=(4, 4, 4), stride=(2, 2, 2)),
]
# Slices that are so large that tiles follow the depth.
DEEP = [
    Volume(n=1, c=54, c_out=24, size=(5, 57, 60)),  # X3D: groups are bands of rows in parts of the depth
    Volume(n=1, c=70, c_out=24, size=(9, 43, 50), stride=(2, 2, 2)),
    Volume(n=2, c=70, c_out=9, size=(5, 41, 50), kernel=(5, 3, 3), stride=(1, 2, 2), padding=(2, 1, 1)),
    Volume(n=1, c=70, c_out=9, size=(7, 41, 50), dilation=(2, 2, 2)),
    Volume(n=1, c=70, c_out=9, size=(7, 43, 50), stride=(3, 4, 2), padding=(2, 1, 1)),  # rows that nothing reads
    Volume(n=17, c=40, c_out=6, size=(2, 47, 59), kernel=(2, 3, 3), padding=(1, 1, 1)),  # more images than groups
    Volume(n=1, c=35, multiplier=2, c_out=6, size=(3, 47, 59), padding=(1, 2, 1)),
]
# Where turned slices of nchw are kept from one tile to the next, though they lie near.
RING = Volume(n=1, c=54, c_out=24, size=(5, 15, 14))
# Rows of nchw that fill vectors, which AVX-512 leaves as they lie; slices of padding alone among them.
PLANES = [
    DEEP[0],
    Volume(n=1, c=7, size=(5, 9, 30)),
    Volume(n=2, c=20, size=(4, 7, 57), kernel=(3, 5, 5), stride=(1, 2, 2), padding=(1, 2, 2)),
    Volume(n=1, c=70, c_out=24, size=(9, 43, 63), stride=(2, 2, 2)),
    Volume(n=2, c=5, size=(4, 10, 40), kernel=(1, 3, 3), padding=(3, 1, 1)),
    Volume(n=1, c=70, c_out=9, size=(9, 41, 50), kernel=(5, 3, 3), padding=(1, 2, 0), dilation=(2, 1, 1)),
    Volume(n=2, c=4, size=(1, 6, 33), kernel=(4, 3, 3), padding=(3, 0, 2), stride=(3, 1, 1), activation="gelu"),
]
# Windows of x that cannot be held as a whole: the rows, the columns or the taps are cut.
WINDOWS = [
    Volume(n=1, c=17, c_out=2, size=(2, 61, 110), padding=(1, 30, 2), dilation=(1, 30, 2)),
    Volume(n=1, c=3, multiplier=2, size=(1, 7, 430), kernel=(3, 3, 30), padding=(3, 3, 2), dilation=(1, 3, 9)),
]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("volume", SHAPES, ids=str)
def test_forward_and_backward(volume, channels_last, device):
    tensors = volume.tensors(torch.float32, device, channels_last)
    check(tensors, volume.kwargs, True, depthwise_separable_conv3d)


def cpu_plan(volume, channels_last=False, backward=False):
    """The plan of the CPU's kernels; None for other kernels."""
    module = _loader.load_library().module
    if module is None:
        return None
    return module.cpu_plan(
        input=[volume.n, volume.c, *volume.size],
        dw_weight=[volume.c * volume.multiplier, 1, *volume.kernel],
        c_out=volume.c_out,
        stride=volume.stride,
        padding=[*volume.padding] * 2,
        dilation=volume.dilation,
        channels_last=channels_last,
        backward=backward,
    )


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("volume", [*DEEP, RING], ids=str)
def test_along_the_depth(volume, channels_last, device):
    for backward in (False, True):
        plan = cpu_plan(volume, channels_last, backward)
        if plan is None:
            continue
        turns = not channels_last and not backward
        assert plan["walks_depth"] == (turns if volume == RING else True)
        if volume in (DEEP[0], RING):
            assert (plan["ring_elements"] > 0) == (turns and not plan["by_planes"])
    volume = replace(volume, activation="silu")  # no kink, on whose sides 32 and 64 bits may stand
    tensors = volume.tensors(torch.float32, device, channels_last)
    check(tensors, volume.kwargs, True, depthwise_separable_conv3d)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("volume", PLANES, ids=str)
def test_by_planes(volume, dtype, device):
    plan = cpu_plan(volume)
    if plan is not None:
        widest = {6: 3, 14: 5}.get(plan["micro_rows"], 0)  # of AVX2 and of AVX-512
        assert plan["by_planes"] == (volume.kernel[-1] <= widest)
        assert not plan["by_planes"] or plan["walks_depth"] == (volume.c > 50)
    check(volume.tensors(dtype, device), volume.kwargs, False, depthwise_separable_conv3d)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_along_the_depth_in_other_types(channels_last, dtype, device):
    volume = Volume(n=1, c=65, c_out=10, size=(4, 47, 61), activation="silu")
    tensors = volume.tensors(dtype, device, channels_last)
    check(tensors, volume.kwargs, True, depthwise_separable_conv3d)


@pytest.mark.parametrize("number", range(len(SHAPES)), ids=[str(shape) for shape in SHAPES])
def test_float64(number, device):
    """The formats, and the two ways of activations, take turns."""
    volume = SHAPES[number]
    if number % 4 < 2:
        volume = replace(volume, activation="silu", out_activation="sigmoid")
    tensors = volume.tensors(torch.float64, device, number % 2 == 0)
    check(tensors, volume.kwargs, True, depthwise_separable_conv3d)


@pytest.mark.one_isa
@pytest.mark.parametrize("volume", WINDOWS, ids=str)
def test_wide_windows(volume, device):
    check(volume.tensors(device=device), volume.kwargs, True, depthwise_separable_conv3d)


@pytest.mark.one_isa
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_activations(activation, device):
    volume = Volume(activation=activation, out_activation="silu")
    check(volume.tensors(device=device), volume.kwargs, True, depthwise_separable_conv3d)


SMALL = (3, 4, 7)
IN_16_BITS = [
    Volume(c=33, c_out=40, size=SMALL),
    Volume(c=33, c_out=40, size=SMALL, stride=(1, 2, 2)),
    Volume(n=1, c=35, multiplier=2, size=SMALL),
    Volume(n=1, c=33, c_out=3, size=(5, 6, 9), kernel=(5, 5, 6), padding=(2, 2, 3)),  # more taps than CUDA stages
    replace(WINDOWS[0], c_out=1),
    *(
        Volume(n=1, c=32, size=SMALL, kernel=kernel, padding=padding)
        for kernel, padding in (
            ((1, 3, 3), (0, 1, 1)),
            ((1, 2, 2), (2, 1, 1)),
            ((3, 1, 1), (1, 0, 0)),
            ((2, 5, 5), (1, 2, 2)),
            ((3, 2, 4), (2, 0, 3)),
        )
    ),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("volume", IN_16_BITS, ids=str)
def test_16_bits(volume, channels_last, dtype, device):
    # PyTorch's own float16 is slow: it, and backward, take turns.
    backward = (IN_16_BITS.index(volume) % 2 == 0) == channels_last
    if dtype == torch.float16 and not backward:
        dtype = torch.bfloat16
        volume = replace(volume, activation="gelu")
    check(volume.tensors(dtype, device, channels_last), volume.kwargs, backward, depthwise_separable_conv3d)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("kernel", [(14, 3, 3), (15, 3, 3), (6, 5, 5)], ids=str)
def test_more_taps_than_shared_memory_takes(kernel, channels_last, dtype, device):
    """Square planes of 126, 135 and 150 taps; CUDA leaves more than 128 in global memory."""
    volume = Volume(n=1, c=7, c_out=9, size=(kernel[0] + 1, 6, 5), kernel=kernel, padding=(1, 1, 1), activation="silu")
    for stride in ((1, 1, 1), (1, 2, 2)):
        volume = replace(volume, stride=stride)
        tensors = volume.tensors(dtype, device, channels_last)
        check(tensors, volume.kwargs, dtype == torch.bfloat16, depthwise_separable_conv3d)


VIEWS = {
    "sliced": lambda x: torch.cat([x, x], 4)[..., 1 : x.shape[4] + 1],
    "every second slice": lambda x: torch.cat([x, x], 2)[:, :, ::2],
    "channels of channels_last": lambda x: torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last_3d)[
        :, 3:8
    ],
    "transposed": lambda x: x.transpose(2, 3),
    "expanded": lambda x: x[:1].expand_as(x),
    "offset": lambda x: torch.cat([x, x], 2)[:, :, 1:5, 1:, 2:],
}


@pytest.mark.one_isa
@pytest.mark.parametrize("view", list(VIEWS))
def test_any_strides(view, device):
    x, *weights = Volume().tensors(device=device)
    check([VIEWS[view](x), *weights], Volume().kwargs, True, depthwise_separable_conv3d)


@pytest.mark.one_isa
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("volume", [Volume(), Volume(n=1)], ids=str)
def test_the_output_has_the_inputs_format(volume, channels_last, device):
    """As PyTorch's depthwise convolution has it; its pointwise one goes by threads and images too."""
    tensors = [t.requires_grad_() for t in volume.tensors(device=device, channels_last=channels_last)]
    y = depthwise_separable_conv3d(*tensors, **volume.kwargs)
    expected = reference.depthwise_separable_conv3d(*tensors, **volume.kwargs)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    (grad_x,) = torch.autograd.grad(y.sum(), tensors[0])

    def is_last(t):
        return t.is_contiguous(memory_format=torch.channels_last_3d)

    z = nn.functional.conv3d(*tensors[:2], padding=1, groups=volume.c)
    assert is_last(y) == is_last(z) == channels_last
    assert is_last(grad_x) == channels_last
    x, dw_weight, pw_weight, *biases = [t.detach() for t in tensors]
    pw_weight = pw_weight.as_strided(pw_weight.shape, (5, 1, 5, 5, 5))
    assert is_last(depthwise_separable_conv3d(x, dw_weight, pw_weight, *biases, padding=1))


@pytest.mark.one_isa
def test_unbatched_and_empty(device):
    x, *weights = Volume().tensors(device=device)
    kwargs = Volume().kwargs
    y = depthwise_separable_conv3d(x, *weights, **kwargs)
    torch.testing.assert_close(depthwise_separable_conv3d(x[0], *weights, **kwargs), y[0])
    flat = [weights[0], weights[1].flatten(1), *weights[2:]]
    assert torch.equal(depthwise_separable_conv3d(x, *flat, **kwargs), y)
    empty = x[:0].requires_grad_()
    weights = [w.requires_grad_() for w in weights]
    y = depthwise_separable_conv3d(empty, *weights, **kwargs)
    assert y.shape == (0, 7, 4, 7, 11)
    assert all(not g.any() for g in torch.autograd.grad(y.sum(), [empty, *weights]))


@pytest.mark.one_isa
def test_one_slice_is_a_2d_convolution(device):
    """Bit for bit: they are the same kernels."""
    tensors = Volume(c=33, size=(1, 15, 17), kernel=(1, 3, 3), padding=(0, 1, 1)).tensors(device=device)
    y = depthwise_separable_conv3d(*tensors, padding=(0, 1, 1), activation="relu")
    flat = [t.squeeze(2) if t.dim() == 5 else t for t in tensors]
    assert torch.equal(y.squeeze(2), depthwise_separable_conv2d(*flat, padding=1, activation="relu"))


@pytest.mark.one_isa
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("volume", [Volume(c=24, c_out=40, size=(7, 20, 20), stride=(1, 2, 1)), DEEP[0]], ids=str)
def test_any_number_of_threads_gives_the_same_bits(volume, channels_last, device):
    tensors = volume.tensors(device=device, channels_last=channels_last, requires_grad=True)
    threads, results = torch.get_num_threads(), []
    dy = torch.randn_like(depthwise_separable_conv3d(*tensors, **volume.kwargs))
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            y = depthwise_separable_conv3d(*tensors, **volume.kwargs)
            results.append((y, *torch.autograd.grad(y, tensors, dy)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


TINY = Volume(n=1, c=2, c_out=3, size=(3, 4, 3), activation="silu")


@pytest.mark.one_isa
@pytest.mark.parametrize(
    "volume",
    [
        TINY,
        replace(TINY, multiplier=2, stride=(2, 1, 2), out_activation="tanh"),
        replace(TINY, kernel=(2, 2, 2), padding="same", dilation=(1, 2, 1), out_activation="gelu"),
    ],
    ids=str,
)
def test_derivatives_of_first_and_second_order(volume, device):
    def function(*tensors):
        return depthwise_separable_conv3d(*tensors, **volume.kwargs)

    tensors = volume.tensors(torch.float64, device, requires_grad=True)
    assert gradcheck(function, tensors, check_forward_ad=True, check_batched_grad=True, fast_mode=True)
    assert gradgradcheck(function, tensors, fast_mode=True)


@pytest.mark.one_isa
@pytest.mark.parametrize(("biases", "channels_last"), [(False, True), (True, False)])
def test_opcheck(biases, channels_last, device):
    _loader.load_library()
    volume = Volume(stride=(1, 2, 1))
    tensors = volume.tensors(device=device, channels_last=channels_last, requires_grad=True)
    if not biases:
        tensors[3:] = [None, None]
    config = [(1, 2, 1), (1, 1, 1) * 2, (1, 1, 1), ACTIVATIONS["gelu"].number, ACTIVATIONS["silu"].number]
    opcheck(torch.ops.dsconv_cuda.fwd.default, (*tensors, *config))
    opcheck(torch.ops.dsconv_cuda.fwd_with_pre.default, (*tensors, *config))
    tensors = [None if t is None else t.detach() for t in tensors]
    y, pre = torch.ops.dsconv_cuda.fwd_with_pre(*tensors, *config)
    opcheck(torch.ops.dsconv_cuda.bwd.default, (torch.randn_like(y), *tensors[:4], pre, *config, 31))
    opcheck(torch.ops.dsconv_cuda.bwd.default, (torch.randn_like(y), *tensors[:4], pre, *config, ops.GRAD_X))


@pytest.mark.one_isa
def test_bare_ops_check_what_would_read_outside_of_a_tensor(device):
    _loader.load_library()
    x, dw, pw, dw_bias, pw_bias = Volume().tensors(device=device)
    three, six = (1, 1, 1), (1,) * 6
    fwd, bwd = torch.ops.dsconv_cuda.fwd, torch.ops.dsconv_cuda.bwd
    for wrong in (
        (x[0], dw, pw, dw_bias, pw_bias, three, six, three),
        (x, dw[:, :, 0], pw, dw_bias, pw_bias, three, six, three),
        (x, dw, pw[..., 0], dw_bias, pw_bias, three, six, three),
        (x, dw, pw, dw_bias, pw_bias, (1, 1), six, three),
        (x, dw, pw, dw_bias, pw_bias, (1, 1), (1,) * 4, (1, 1)),
        (x, dw, pw, dw_bias, pw_bias, three, (1,) * 4, three),
    ):
        with pytest.raises(RuntimeError, match="dsconv_cuda::fwd"):
            fwd(*wrong, 0, 0)
    y = fwd(x, dw, pw, dw_bias, pw_bias, three, six, three, 0, 0)
    for dy in (y[:, :, :-1], y[..., :-1], y[0]):
        with pytest.raises(RuntimeError, match="shape of the output"):
            bwd(dy, x, dw, pw, dw_bias, None, three, six, three, 0, 0, 31)
    with pytest.raises(RuntimeError, match="take 2 numbers"):
        torch.ops.dsconv_cuda.z_moments(x, dw, pw, dw_bias, three, six[:4], three)


@pytest.mark.one_isa
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_in_one_graph_for_every_size(backend, device):
    torch._dynamo.reset()
    block = DepthwiseSeparableConv3d(5, 7, 3, padding=1, bias=True, activation="relu6", out_activation="silu").to(
        device
    )
    compiled = torch.compile(block, fullgraph=True, backend=backend, dynamic=True)
    for n, size in ((2, (4, 7, 9)), (3, (5, 8, 6))):
        x = torch.randn(n, 5, *size, device=device, requires_grad=True)
        y, expected = compiled(x), block(x)
        torch.testing.assert_close(y, expected)
        wanted = [x, *block.parameters()]
        dy = torch.randn_like(y)
        torch.testing.assert_close(torch.autograd.grad(y, wanted, dy), torch.autograd.grad(expected, wanted, dy))
    torch._dynamo.reset()


@pytest.mark.one_isa
def test_packed_weights_of_compiled_graphs(device):
    """Of calls without gradients with large weights."""
    torch._dynamo.reset()
    block = DepthwiseSeparableConv3d(128, 128, 3, padding=1, activation="relu").to(device)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    x = torch.randn(1, 128, 2, 3, 4, device=device)
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(compiled(x), block(x))
            block.pointwise.weight.mul_(2)
    torch._dynamo.reset()


@pytest.mark.one_isa
def test_transforms_autocast_meta_and_export(device):
    block = DepthwiseSeparableConv3d(4, 6, (2, 3, 3), padding="same", bias=True, activation="relu").to(device)
    x = torch.randn(3, 4, 3, 5, 6, device=device)
    expected = block(x)

    def loss(parameters, image):
        return torch.func.functional_call(block, parameters, (image,)).square().mean()

    parameters = dict(block.named_parameters())
    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i, image in enumerate(x):
        one = torch.func.grad(loss)(parameters, image)
        torch.testing.assert_close({n: g[i] for n, g in per_sample.items()}, one)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y = block(x)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05)
        assert block.double()(x.double()).dtype == torch.float64
    block.float()
    on_meta = copy.deepcopy(block).to("meta")(x.to("meta"))
    assert on_meta.shape == expected.shape
    assert on_meta.stride() == expected.stride()
    program = torch.export.export(block, (x,)).run_decompositions(decomposition_table())
    assert "dsconv_cuda" not in str(program.graph)
    torch.testing.assert_close(program.module()(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.one_isa
@pytest.mark.parametrize(
    "kwargs",
    [
        {"padding": 1},
        {"padding": (2, 1, 0), "stride": (1, 2, 2), "channel_multiplier": 2},
        {"padding": "same", "dilation": (1, 2, 1)},
        {"padding": (1, 2, 1), "padding_mode": "replicate"},
        {"padding": 2, "padding_mode": "circular"},
        {"padding": "same", "padding_mode": "reflect"},
    ],
    ids=str,
)
def test_the_module(kwargs, device):
    module = DepthwiseSeparableConv3d(4, 6, (3, 2, 3), bias=True, activation=nn.ReLU(), **kwargs).to(device)
    x = torch.randn(2, 4, 5, 6, 7, device=device, requires_grad=True)

    def stock(x):
        return module.pointwise(module.depthwise(x).relu())

    wanted = [x, *module.parameters()]
    y, expected = module(x), stock(x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    dy = torch.randn_like(y)
    for ours, theirs in zip(torch.autograd.grad(y, wanted, dy), torch.autograd.grad(expected, wanted, dy), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(module(x[0]), expected[0], rtol=1e-4, atol=1e-5)
    plain = nn.ModuleDict({"depthwise": module.depthwise, "pointwise": module.pointwise})
    assert isinstance(module.depthwise, nn.Conv3d)
    assert list(module.state_dict()) == list(plain.state_dict())
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), y)
    seen = []
    module.pointwise.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)
    assert seen == [1]


@pytest.mark.one_isa
def test_what_is_kept_for_backward(device):
    """The input itself, and nothing as large as the intermediate."""
    x, *weights = Volume(c=16, c_out=4).tensors(device=device)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        depthwise_separable_conv3d(x.requires_grad_(), *weights, padding=1, activation="gelu")
    assert x.data_ptr() in [t.data_ptr() for t in kept]
    assert not [t for t in kept if t.numel() >= x.numel() and t.data_ptr() != x.data_ptr()]


@pytest.mark.one_isa
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("backward", [False, True])
def test_scratch_of_a_thread_is_a_mebibyte_at_most(backward, channels_last, isa):
    module = _loader.load_library().module
    if module is None:
        pytest.skip("the kernels of this backend come without the planner's queries")
    for c, size, c_out, kernel in ((54, (16, 56, 56), 24, 3), (432, (16, 7, 7), 192, 3), (64, (64, 64, 64), 64, 9)):
        plan = module.cpu_plan(
            input=[8, c, *size], dw_weight=[c, 1, kernel, kernel, kernel], c_out=c_out, stride=[1] * 3,
            padding=[kernel // 2] * 6, dilation=[1] * 3, channels_last=channels_last, backward=backward,
        )  # fmt: skip
        assert 0 < plan["scratch_bytes"] <= 1 << 20


@pytest.mark.one_isa
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            {"input": torch.randn(4, 3, 3)},
            ValueError,
            r"input must have shape \[N, C, D, H, W\] or \[C, D, H, W\], got 3",
        ),
        ({"dw_weight": torch.randn(4, 1, 3, 3)}, ValueError, r"dw_weight must have shape \[C \* m, 1, kd, kh, kw\]"),
        ({"dw_weight": torch.randn(4, 1, 0, 3, 3)}, ValueError, "a kernel of at least 1 x 1 x 1"),
        ({"pw_weight": torch.randn(6, 4, 1, 1, 3)}, ValueError, "pw_weight must be 1x1x1"),
        ({"pw_weight": torch.randn(6, 4, 1, 1)}, ValueError, r"of shape \[C_out, 4, 1, 1, 1\]"),
        ({"pw_bias": torch.randn(5)}, ValueError, r"pw_bias must have shape \[6\]"),
        ({"stride": (1, 2)}, ValueError, "stride must be an int or three ints, got 2 numbers"),
        ({"stride": (1, 0, 1)}, ValueError, "stride must be at least 1"),
        ({"dilation": 1.5}, TypeError, "dilation must be an int or three ints"),
        ({"padding": "causal"}, ValueError, 'padding must be an int or three ints, "same" or "valid"'),
        ({"padding": "same", "stride": (2, 1, 1)}, ValueError, "stride 1 only"),
        ({"padding": (0, -1, 0)}, ValueError, "padding must be at least 0"),
        ({"dilation": (5, 1, 1)}, ValueError, "larger than the padded input along the depth"),
        ({"dilation": (1, 1, 5)}, ValueError, "larger than the padded input along the width"),
        ({"padding": 2**60}, ValueError, "overflow"),
        ({"pw_weight": torch.randn(6, 4).double()}, TypeError, "must have the dtype of input"),
        ({"input": 3}, TypeError, "input must be a Tensor"),
    ],
)
def test_errors(change, error, words):
    arguments = {
        "input": torch.randn(2, 4, 4, 5, 6),
        "dw_weight": torch.randn(4, 1, 3, 3, 3),
        "pw_weight": torch.randn(6, 4, 1, 1, 1),
    }
    with pytest.raises(error, match=f"depthwise_separable_conv3d: .*{words}"):
        depthwise_separable_conv3d(**(arguments | change))
