"""The block with two BatchNorms in one and in three dimensions: against stock modules by the budget of oracle.py, op by
op, in chains, graphs and over several threads."""

import copy
from dataclasses import dataclass, replace

import pytest
import torch
from test_batchnorm_block import check
from torch import Tensor, nn
from torch.library import opcheck

import dsconv_cuda
from bench.accuracy import results
from dsconv_cuda import (
    BatchNormArguments,
    DepthwiseSeparableConvBN1d,
    DepthwiseSeparableConvBN2d,
    DepthwiseSeparableConvBN3d,
    DepthwiseSeparableSequence,
    _loader,
)

pytestmark = [pytest.mark.usefixtures("isa")]

BLOCKS = {1: DepthwiseSeparableConvBN1d, 2: DepthwiseSeparableConvBN2d, 3: DepthwiseSeparableConvBN3d}
NORMS = {1: nn.BatchNorm1d, 3: nn.BatchNorm3d}


@dataclass(frozen=True)
class Shape:
    size: tuple  # of an image
    n: int = 2
    c: int = 13
    multiplier: int = 1
    c_out: int = 17
    kernel: int | tuple = 3
    stride: int | tuple = 1
    padding: int | tuple | str = 1
    dilation: int | tuple = 1
    bias: bool = True
    activation: str = "relu6"
    out_activation: str = "relu"

    def __str__(self):
        return ",".join(f"{k}={v}" for k, v in vars(self).items() if v != getattr(type(self), k, None))

    def block(self, **options) -> nn.Module:
        block = BLOCKS[len(self.size)](
            self.c,
            self.c_out,
            self.kernel,
            self.stride,
            self.padding,
            dilation=self.dilation,
            channel_multiplier=self.multiplier,
            bias=self.bias,
            activation=self.activation,
            out_activation=self.out_activation,
            **options,
        )
        with torch.no_grad():
            for norm in (block.bn1, block.bn2):
                norm.weight.uniform_(0.5, 2)
                norm.bias.normal_()
                norm.running_mean.normal_()
                norm.running_var.uniform_(0.5, 2)
        return block

    def input(self, channels_last: bool = False) -> Tensor:
        x = 3 * torch.randn(self.n, self.c, *self.size) + 1
        return x.contiguous(memory_format=torch.channels_last_3d) if channels_last else x


ROWS = [
    Shape((50,)),
    Shape((47,), c=64, c_out=64, kernel=31, padding=15, activation="silu", out_activation="identity"),
    Shape((80,), c=20, c_out=40, kernel=5, stride=2, padding="valid", multiplier=2, bias=False, activation="gelu"),
    Shape((61,), n=3, kernel=4, padding="same", dilation=2, activation="hardswish", out_activation="silu"),
    # images that AVX-512 leaves as they lie, in backward too
    Shape((45, 61), c=35, stride=2, activation="silu", out_activation="relu"),
    Shape((30, 57), n=3, c=20, c_out=40, stride=2, bias=False, activation="relu6", out_activation="silu"),
    # by panels of channels: many of them on few pixels
    Shape((60,), n=1, c=300, c_out=130, kernel=9, padding=4, out_activation="tanh"),
]
VOLUMES = [
    Shape((5, 7, 9)),
    Shape((4, 9, 8), c=16, c_out=24, kernel=(3, 3, 5), stride=(1, 2, 2), padding=(1, 1, 2), activation="silu"),
    Shape((7, 6, 6), c=3, multiplier=2, c_out=5, stride=2, bias=False, out_activation="gelu"),
    Shape((6, 8, 10), c=8, kernel=(2, 3, 2), padding="same", dilation=(2, 1, 1), activation="leaky_relu"),
    Shape((1, 12, 12), c=33, c_out=40, kernel=(3, 3, 3), activation="identity", out_activation="hardswish"),
    Shape((5, 6, 7), n=1, c=272, c_out=100, activation="silu"),
    Shape((4, 20, 20), n=2, c=64, c_out=48),
    Shape((3, 9, 57), c=18),  # AVX-512 leaves nchw as it lies
    Shape((7, 40, 60), n=1, c=48, c_out=12, kernel=(5, 3, 3), stride=2, padding=(2, 1, 1)),  # tiles follow the depth
]
CASES = [*((shape, False) for shape in ROWS), *((shape, cl) for shape in VOLUMES for cl in (False, True))]


@pytest.fixture(autouse=True)
def _loaded():
    _loader.load_library()


@pytest.mark.parametrize(("shape", "channels_last"), CASES, ids=str)
def test_training(shape, channels_last, device):
    check(shape.block(), shape.input(channels_last), device)


@pytest.mark.one_isa
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [ROWS[0], VOLUMES[1]], ids=str)
def test_dtypes(shape, dtype, device):
    """Without kinks, as in test_batchnorm_block.py."""
    shape = replace(shape, activation="silu", out_activation="silu")
    check(shape.block(dtype=dtype), shape.input().to(dtype), device)


@pytest.mark.one_isa
@pytest.mark.parametrize("view", ["sliced", "transposed", "expanded"])
def test_any_strides(view, device):
    """Rows and slices of x and of the output's gradient that do not lie after one another."""
    shape = Shape((5, 6, 7), activation="silu", out_activation="silu")
    block = shape.block().to(device)
    x = {
        "sliced": lambda x: torch.cat([x, x], 2)[:, :, 2:7, :, :],
        "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        "expanded": lambda x: x[:, :, :1].expand(-1, -1, 5, -1, -1),
    }[view](shape.input().to(device))
    dy = torch.randn(2, 10, 17, 6, 7, device=device).transpose(1, 2)[:, :, ::2]
    for name, value in results(block, x, dy).items():
        expected = results(block, x.contiguous(), dy.contiguous())[name]
        # Dense planes are summed in another order.
        rounding = 16 * torch.finfo(value.dtype).eps * max(1.0, expected.abs().max().item())
        torch.testing.assert_close(value, expected, rtol=0, atol=rounding)


@pytest.mark.one_isa
def test_one_row_or_slice_is_a_2d_block(device):
    """The same bits: they are the same kernels."""
    flat = BLOCKS[2](6, 10, (1, 5), padding=(0, 2), activation="silu").to(device)
    row, volume = BLOCKS[1](6, 10, 5, padding=2, activation="silu"), BLOCKS[3](6, 10, (1, 1, 5), padding=(0, 0, 2))
    volume.activation = "silu"
    for other, views in ((row, lambda t: t[:, :, 0]), (volume, lambda t: t[:, :, None])):
        other.to(device)
        state = {n: t if t.dim() != 4 else views(t) for n, t in flat.state_dict().items()}
        other.load_state_dict(state)
        x, dy = torch.randn(3, 6, 1, 20, device=device), torch.randn(3, 10, 1, 20, device=device)
        ours, theirs = results(other, views(x), views(dy)), results(flat, x, dy)
        for name, value in theirs.items():
            assert torch.equal(ours[name], views(value) if value.dim() == 4 else value), name


@pytest.mark.one_isa
@pytest.mark.parametrize("first_norms", [True, False])
@pytest.mark.parametrize("dims", [1, 3])
def test_chains_equal_blocks_one_by_one(dims, first_norms, device):
    """In a DepthwiseSeparableSequence, where a block's second norm is made by the next one's kernels."""
    block = BLOCKS[dims]
    blocks = [block(5, 9, 3, padding=1), block(9, 9, 3, 2, 1, activation="silu"), block(9, 4, 3, padding=1)]
    if not first_norms:
        blocks[1].bn1, blocks[2].bn1 = nn.Identity(), blocks[2].bn1.eval()
    chain = DepthwiseSeparableSequence(*blocks).to(device, torch.float64)
    plain = nn.Sequential(*copy.deepcopy(blocks)).to(device, torch.float64)
    x = torch.randn(2, 5, *(11, 6, 7)[-dims:], device=device, dtype=torch.float64)
    dy = torch.randn_like(copy.deepcopy(plain)(x))
    for name, value in results(plain, x, dy).items():
        torch.testing.assert_close(results(chain, x, dy)[name], value, rtol=1e-9, atol=1e-9)
    kept, saved = chain.kept_bytes(x.shape), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        chain(x)
    maps = {(t.data_ptr(), t.numel()): t.numel() * 8 for t in saved if t.dim() >= 3 and t.shape[0] == 2}
    assert sum(maps.values()) == kept.chain < kept.blocks < kept.plain


@pytest.mark.one_isa
@pytest.mark.parametrize("dims", [1, 3])
def test_hooks_and_padding_modes(dims, device):
    """A hook on a child sees what it would see in PyTorch; other paddings are made around the input."""
    block, plain = (BLOCKS[dims](5, 9, 3, padding=1).to(device, torch.float64) for _ in range(2))
    plain.load_state_dict(block.state_dict())
    x = torch.randn(2, 5, *(11, 6, 7)[-dims:], device=device, dtype=torch.float64)
    dy = torch.randn_like(copy.deepcopy(block)(x))
    expected = results(block, x, dy)
    seen = []
    block.bn1.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].detach()))
    for name, value in results(block, x, dy).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-9, msg=name)
    torch.testing.assert_close(seen[0], plain.depthwise(x).detach())
    convolution = type(block.depthwise)
    around = convolution(
        5, 5, 3, padding=1, groups=5, padding_mode="circular", bias=False, device=device, dtype=x.dtype
    )
    around.weight = plain.depthwise.weight
    plain.depthwise = around
    z = plain.bn1(around(x)).relu()
    y = copy.deepcopy(plain.bn2)(plain.pointwise(z)).relu()
    torch.testing.assert_close(plain(x), y, rtol=1e-9, atol=1e-9)


@pytest.mark.one_isa
@pytest.mark.parametrize("dims", [1, 3])
def test_the_functions(dims, device):
    shape = ROWS[0] if dims == 1 else VOLUMES[0]
    block, x = shape.block().to(device), shape.input().to(device)
    norms = [
        BatchNormArguments(n.running_mean.clone(), n.running_var.clone(), n.weight, n.bias, True, n.momentum, n.eps)
        for n in (block.bn1, block.bn2)
    ]
    function = {1: dsconv_cuda.depthwise_separable_conv_bn1d, 3: dsconv_cuda.depthwise_separable_conv_bn3d}[dims]
    weights = block.depthwise.weight, block.pointwise.weight.flatten(1), block.depthwise.bias, block.pointwise.bias
    out = function(x, *weights, *norms, padding=1, activation="relu6")
    assert torch.equal(out, block(x))
    for norm, module in zip(norms, (block.bn1, block.bn2), strict=True):
        assert torch.equal(norm.running_mean, module.running_mean)
        assert torch.equal(norm.running_var, module.running_var)


@pytest.mark.one_isa
def test_causal_training_sees_nothing_of_what_comes_after(device):
    """Statistics are of the whole batch; without the norm between, no output depends on later inputs."""
    x = torch.randn(2, 4, 30, device=device, requires_grad=True)
    dw, pw = torch.randn(4, 1, 5, device=device), torch.randn(3, 4, 1, device=device)
    norm = BatchNormArguments(training=True)
    y = dsconv_cuda.depthwise_separable_conv_bn1d(x, dw, pw, bn1=None, bn2=norm, padding="causal", out_activation=None)
    assert y.shape == (2, 3, 30)
    z = nn.functional.conv1d(nn.functional.pad(x, (4, 0)), dw, groups=4).relu()
    expected = nn.functional.batch_norm(nn.functional.conv1d(z, pw), None, None, training=True)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


class Stock(nn.Module):
    """The children of a block one after the other, behind `left` zeros at the left."""

    def __init__(self, block: nn.Module, left: int = 0):
        super().__init__()
        self.left = left
        for name, child in block.named_children():
            setattr(self, name, copy.deepcopy(child))

    def forward(self, x):
        a = self.bn1(self.depthwise(nn.functional.pad(x, (self.left, 0)))).relu()
        return self.bn2(self.pointwise(a)).relu()


@pytest.mark.one_isa
@pytest.mark.parametrize("padding", [1, (2,), "same"])
@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_padding_mode_of_the_block(dims, mode, padding, device):
    """The keyword of nn.Conv2d."""
    padding = padding * dims if isinstance(padding, tuple) else padding
    block = BLOCKS[dims](5, 9, 3, padding=padding, padding_mode=mode).to(device, torch.float64)
    x = torch.randn(2, 5, *(8, 6, 7)[:dims], device=device, dtype=torch.float64)
    for train in (True, False):
        stock = Stock(block).train(train)
        expected = stock(x)
        torch.testing.assert_close(block.train(train)(x), expected)
        assert torch.equal(block.bn1.num_batches_tracked, stock.bn1.num_batches_tracked)


CAUSAL = {"stride": 2, "dilation": 3, "padding": "causal"}


@pytest.mark.one_isa
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("change", [None, "bn1 eval", "bn2 eval", "eval", "hook", "identity", "many channels, eval"])
def test_causal_padding_of_the_block(change, compiled, device):
    channels = 128 if change == "many channels, eval" else 5
    block = BLOCKS[1](channels, channels, 4, **CAUSAL).to(device)
    assert block.padding == "causal"
    assert "padding=causal" in repr(block)
    if change == "identity":
        block.bn1 = nn.Identity()
    for norm in (block.bn1, block.bn2):
        if change is not None and (
            "eval" in change and (norm is getattr(block, change[:3], None) or "bn" not in change)
        ):
            norm.eval()
    stock = Stock(block, left=9)
    if change == "hook":
        block.pointwise.register_forward_hook(lambda module, inputs, output: None)
    torch._dynamo.reset()
    call = torch.compile(block, backend="aot_eager") if compiled else block
    x = torch.randn(3, channels, 30, device=device)
    for grad in (False, True, False, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(call(x), stock(x), rtol=1e-4, atol=1e-4)
    for a, b in zip(block.buffers(), stock.buffers(), strict=True):
        torch.testing.assert_close(a, b)
    assert torch.equal(copy.deepcopy(block).eval()(x), block.eval()(x))


@pytest.mark.one_isa
def test_causal_blocks_in_a_sequence_and_under_autocast(device):
    chain = DepthwiseSeparableSequence(*(BLOCKS[1](5, 5, 4, **(CAUSAL | {"stride": 1})) for _ in range(3))).to(device)
    stock = nn.Sequential(*(Stock(block, left=9) for block in chain))
    x = torch.randn(3, 5, 30, device=device)
    for train in (True, False):
        torch.testing.assert_close(chain.train(train)(x), stock.train(train)(x), rtol=1e-4, atol=1e-4)
    assert chain.train().kept_bytes(x.shape).chain == 4 * 3 * x.numel() + 4 * x.numel()
    chain.eval()
    with torch.no_grad(), torch.autocast(x.device.type, dtype=torch.bfloat16):
        for _ in range(3):
            torch.testing.assert_close(chain(x).float(), stock(x).float(), rtol=5e-2, atol=5e-2)


@pytest.mark.one_isa
@pytest.mark.parametrize("dims", [1, 3])
def test_evaluation_and_frozen_norms(dims, device):
    shape = ROWS[3] if dims == 1 else VOLUMES[3]
    for frozen in (("bn1",), ("bn2",), ("bn1", "bn2")):
        block = shape.block()
        for name in frozen:
            getattr(block, name).eval()
        check(block, shape.input(), device)


@pytest.mark.one_isa
@pytest.mark.parametrize("shape", [ROWS[1], VOLUMES[5], VOLUMES[6]], ids=str)
def test_the_same_bits_for_any_number_of_threads(shape, device):
    threads = torch.get_num_threads()
    block, x = shape.block().to(device), shape.input(len(shape.size) == 3).to(device)
    try:
        found = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(results(block, x, torch.ones_like(copy.deepcopy(block)(x)).cumsum(1)))
        for other in found[1:]:
            assert all(torch.equal(value, other[name]) for name, value in found[0].items())
    finally:
        torch.set_num_threads(threads)


@pytest.mark.one_isa
def test_gradients_against_finite_differences(device):
    shape = Shape((2, 3, 3), c=2, c_out=3, activation="silu", out_activation="tanh")
    block = shape.block(dtype=torch.float64).to(device)
    names = [name for name, _ in block.named_parameters()]

    def function(x, *parameters):
        return torch.func.functional_call(block, dict(zip(names, parameters, strict=True)), (x,))

    x = shape.input().double().to(device).requires_grad_()
    assert torch.autograd.gradcheck(function, (x, *block.parameters()), fast_mode=True)


@pytest.mark.one_isa
@pytest.mark.parametrize("dims", [1, 3])
def test_recomputing_the_output_and_empty_batches(dims, device):
    shape = ROWS[0] if dims == 1 else VOLUMES[0]
    block, x = shape.block().to(device), shape.input().to(device)
    dy = torch.randn_like(copy.deepcopy(block)(x))
    kept = results(block, x, dy)
    block.recompute_output = True
    assert all(torch.equal(value, kept[name]) for name, value in results(block, x, dy).items())
    empty = x[:0].clone().requires_grad_()
    block(empty).sum().backward()
    assert empty.grad.shape == empty.shape
    assert all(p.grad is not None and not p.grad.any() for p in block.parameters())


@pytest.mark.one_isa
@pytest.mark.parametrize("dims", [1, 3])
def test_compiled_in_one_graph_for_every_size(dims, device):
    """From the second size on."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    block = BLOCKS[dims](4, 6, 3, padding=1, activation="silu").to(device)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for n, extents in ((2, (9, 6, 7)), (3, (8, 7, 9)), (5, (12, 8, 6))):
        x = torch.randn(n, 4, *extents[:dims], device=device, requires_grad=True)
        eager = results(block, x, torch.ones(n, 6, *x.shape[2:], device=device))
        for name, value in results_of(compiled, block, x).items():
            torch.testing.assert_close(value, eager[name], msg=name)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def results_of(compiled, block, x) -> dict[str, Tensor]:
    """As results(), by the compiled form of `block`, whose buffers are put back."""
    state = copy.deepcopy(block.state_dict())
    out = compiled(x)
    named = dict(block.named_parameters())
    grads = torch.autograd.grad(out, [x, *named.values()], torch.ones_like(out))
    found = {"out": out.detach()} | dict(zip(("grad x", *(f"grad {n}" for n in named)), grads, strict=True))
    found |= {n: b.clone() for n, b in block.named_buffers() if b.is_floating_point()}
    block.load_state_dict(state)
    return found


@pytest.mark.one_isa
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("biases", [False, True])
def test_opcheck(biases, channels_last, device):
    ops, tests = torch.ops.dsconv_cuda, ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    geometry = ([2, 1, 1], [1, 0, 1, 1, 1, 1], [1, 1, 2])
    silu, tanh = 4, 9
    x = torch.randn(2, 6, 5, 7, 8, device=device)
    x = x.contiguous(memory_format=torch.channels_last_3d) if channels_last else x
    dw, pw = torch.randn(12, 1, 3, 2, 3, device=device), torch.randn(5, 12, 1, 1, 1, device=device)
    dw_bias, pw_bias = (torch.randn(n, device=device) if biases else None for n in (12, 5))
    operands = (x, dw, pw, dw_bias)
    arguments = {"z_moments": (*operands, *geometry)}
    vectors = ops.norm_vectors(ops.z_moments(*arguments["z_moments"]), None, None, 1e-5)
    in_norm = (ops.norm_vectors(ops.moments(x), None, None, 1e-5), tanh)
    arguments["fwd_norm"] = (*operands, pw_bias, vectors, *geometry, silu, True)
    y, moments = ops.fwd_norm(*arguments["fwd_norm"])
    torch.testing.assert_close(moments, ops.moments(y), rtol=1e-5, atol=1e-5)  # another order, in float32
    arguments["moments"] = (y,)
    of_y = ops.norm_vectors(moments, None, None, 1e-5)
    grad = torch.randn_like(y)
    arguments["norm_act"] = (y, of_y, tanh)
    arguments["norm_act_sums"] = (grad, y, of_y, tanh)
    sums, count = ops.norm_act_sums(*arguments["norm_act_sums"]), y.numel() / 5
    arguments["norm_act_grad"] = (grad, y, of_y, sums, count, tanh)
    both = (grad, y, *operands, vectors, of_y, sums, count, *geometry, silu, tanh, 31)
    arguments["bwd_norm"] = both
    opcheck(ops.bwd_norm_pointwise.default, both, test_utils=tests[:2])  # du has room that nothing is written to
    du, du_sums, grad_pw, grad_b = ops.bwd_norm_pointwise(*both)
    arguments["bwd_norm_depthwise"] = (du, *operands, vectors, du_sums, count, *geometry, 3)
    for name, args in arguments.items():
        opcheck(getattr(ops, name).default, args, test_utils=tests)
    for name in ("z_moments", "fwd_norm", "bwd_norm"):
        opcheck(getattr(ops, name).default, (*arguments[name], *in_norm), test_utils=tests)
    du, *_ = ops.bwd_norm_pointwise(*both)
    apart = (*ops.bwd_norm_depthwise(du, *operands, vectors, du_sums, count, *geometry, 3), grad_pw, grad_b, du_sums)
    for a, b in zip(apart, ops.bwd_norm(*both), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.one_isa
@pytest.mark.parametrize(
    ("shape", "wrong", "words"),
    [
        (ROWS[0], (13, 50), r"\[N, C, L\], as nn.BatchNorm1d takes, got \[13, 50\]"),
        (ROWS[0], (2, 13, 5, 5), r"\[N, C, L\]"),
        (ROWS[0], (2, 12, 50), "input must have 13 channels, as many as .depthwise takes, got 12"),
        (VOLUMES[0], (13, 5, 5, 5), r"\[N, C, D, H, W\]"),
        (VOLUMES[0], (2, 13, 5, 0, 5), "larger than the padded input|more than 1 value"),
    ],
)
def test_errors(shape, wrong, words, device):
    block = shape.block().to(device)
    if "larger" in words:
        block.depthwise.padding = (0, 0, 0)
    with pytest.raises(ValueError, match=words):
        block(torch.randn(wrong, device=device))


@pytest.mark.one_isa
@pytest.mark.parametrize("dims", [1, 3])
def test_one_value_per_channel_and_other_norms_raise(dims, device):
    block = BLOCKS[dims](4, 6, 1).to(device)
    x = torch.randn(1, 4, *(1, 1, 1)[:dims], device=device)
    with pytest.raises(ValueError, match=r"Expected more than 1 value per channel.*\[1, 4" + ", 1" * dims + r"\]"):
        block(x)
    block.bn1 = nn.BatchNorm2d(4).to(device)
    with pytest.raises(TypeError, match=f"nn.BatchNorm{dims}d"):
        block(torch.randn(2, 4, *(3, 3, 3)[:dims], device=device))


@pytest.mark.one_isa
@pytest.mark.parametrize("dims", [1, 3])
def test_synchronised_norms_and_identities(dims, device):
    """What may replace a norm: without a process group SyncBatchNorm is BatchNorm; Identity is none."""
    shape = ROWS[0] if dims == 1 else VOLUMES[0]
    block, x = shape.block().to(device), shape.input().to(device)
    dy = torch.randn_like(copy.deepcopy(block)(x))
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(block))
    assert type(synchronised.bn1) is nn.SyncBatchNorm
    expected = results(block, x, dy)
    for name, value in results(synchronised, x, dy).items():
        torch.testing.assert_close(value, expected[name], msg=name)
    block.bn1 = nn.Identity()
    z = nn.functional.relu6(block.depthwise(x))
    torch.testing.assert_close(block(x), block.bn2(block.pointwise(z)).relu(), rtol=1e-4, atol=1e-4)


@pytest.mark.one_isa
@pytest.mark.parametrize("dims", [1, 3])
def test_second_derivatives_are_refused_by_name(dims, device):
    shape = ROWS[0] if dims == 1 else VOLUMES[0]
    block, x = shape.block().to(device), shape.input().to(device).requires_grad_()
    (grad,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.sum().backward()
