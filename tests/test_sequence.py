"""A sequence of blocks that make each other's second norm: the numbers of the blocks one by one, with less kept."""

import copy
import pickle
import warnings
from functools import partial

import pytest
import torch
from shapes import identify
from test_batchnorm_block import Shape
from test_batchnorm_module import MOBILENET
from torch import nn

import dsconv_cuda
from bench.accuracy import Plain, largest_difference, results
from bench.saved import saved_bytes
from dsconv_cuda import DepthwiseSeparableConvBN2d, DepthwiseSeparableSequence

pytestmark = [pytest.mark.usefixtures("isa")]


def sequence_of(*shapes: Shape, dtype=torch.float32) -> DepthwiseSeparableSequence:
    return DepthwiseSeparableSequence(*(shape.block(dtype=dtype) for shape in shapes))


def one_by_one(sequence: DepthwiseSeparableSequence) -> nn.Sequential:
    return nn.Sequential(*copy.deepcopy(sequence))


def output_gradient(module, x):
    return torch.randn_like(copy.deepcopy(module)(x))


def assert_same(actual, expected, **tolerance):
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


CHAINS = {
    "odd channels": (Shape(), Shape(c=17, c_out=19, activation="silu"), Shape(c=19, c_out=5)),
    "strides": (
        Shape(n=2, c=33, c_out=40, h=20, w=22, stride=2, out_activation="silu"),
        Shape(c=40, c_out=24, stride=2, out_activation="sigmoid"),
        Shape(c=24, c_out=24, kernel=5, out_activation="identity"),
    ),
    # sigmoid and gelu do not map 0 to 0, or beta to 0: what is outside the image must stay zero
    "multiplier": (Shape(out_activation="sigmoid"), Shape(c=17, multiplier=2, c_out=8), Shape(c=8, c_out=33)),
    "dilation": (Shape(out_activation="gelu"), Shape(c=17, c_out=21, dilation=2, kernel=5)),
    "1x1 kernel": (Shape(c_out=16), Shape(c=16, c_out=16, kernel=1, bias=False)),
    # the CPU backward by panels of channels, in one tile of pixels and in several
    "panels": (Shape(n=1, c=32, c_out=272, h=14, w=14), Shape(c=272, c_out=100), Shape(c=100, c_out=32)),
    # a window of the second kernel that does not fit the cache: its input is made for the op
    "large kernel": (Shape(n=1, c=3, c_out=18, h=9, w=200), Shape(c=18, c_out=5, kernel=9, dilation=33)),
    # what the second block makes of its input for backward does not fit the caches; a last tile of few pixels
    "beyond the caches": (Shape(n=1, c=3, c_out=32, h=260, w=259), Shape(c=32, c_out=5)),
}


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", CHAINS)
def test_numbers_of_the_blocks_one_by_one(name, channels_last, isa, device):
    if isa == "emulated" and name in ("panels", "large kernel", "strides", "beyond the caches"):
        pytest.skip("what is large for the CPU's sake")
    shapes = CHAINS[name]
    sequence = sequence_of(*shapes, dtype=torch.float64).to(device)
    x = shapes[0].input(channels_last).double().to(device)
    dy = output_gradient(sequence, x)
    expected = results(one_by_one(sequence), x, dy)
    assert_same(results(sequence, x, dy), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=identify)
@pytest.mark.parametrize("channels_last", [False, True])
def test_error_beside_that_of_stock_modules(dtype, channels_last, isa, device):
    """Within twice the error of stock modules in the dtype, the largest over some orders of summation. Without kinks,
    which rounding moves values across."""
    smooth = {"activation": "silu", "out_activation": "silu"}
    sequence = sequence_of(
        Shape(c=24, c_out=40, **smooth), Shape(c=40, c_out=17, stride=2, **smooth), Shape(c=17, c_out=24, **smooth),
        dtype=dtype,
    )  # fmt: skip
    plain = nn.Sequential(*(Plain(block) for block in sequence))
    x = Shape(c=24).input(channels_last).to(dtype)
    dy = output_gradient(plain, x)
    exact = results(copy.deepcopy(plain).double(), x.double(), dy.double())
    stock = [
        results(plain, x.contiguous(memory_format=memory_format), dy)
        for memory_format in (torch.contiguous_format, torch.channels_last)
    ]
    for images in ([2, 1, 0], [1, 2, 0]):
        back = torch.tensor(images).argsort()
        found = results(plain, x[images], dy[images])
        stock.append({n: v[back] if n in ("out", "grad x") else v for n, v in found.items()})
    actual = results(sequence.to(device), x.to(device), dy.to(device))
    assert actual.keys() == exact.keys()
    for name, value in actual.items():
        own = max(largest_difference(found[name], exact[name]) for found in stock)
        budget = 2 * own + torch.finfo(dtype).eps * exact[name].abs().max().item()
        difference = largest_difference(value, exact[name])
        assert difference <= budget, f"{name} is off by {difference:.3g}, allowed is {budget:.3g}"


@pytest.mark.one_isa
@pytest.mark.parametrize("which", ["bn1", "bn2"])
@pytest.mark.parametrize("change", ["frozen", "without affine", "without statistics", "Identity", "synchronised"])
def test_norms_of_every_kind_in_the_middle(which, change, device):
    sequence = sequence_of(Shape(), Shape(c=17, c_out=13), Shape(), dtype=torch.float64).to(device)
    for block in sequence[:2] if which == "bn2" else sequence[1:]:
        norm = getattr(block, which)
        features = norm.num_features
        setattr(
            block,
            which,
            {
                "frozen": norm.eval(),
                "without affine": nn.BatchNorm2d(features, affine=False),
                "without statistics": nn.BatchNorm2d(features, track_running_stats=False),
                "Identity": nn.Identity(),
                "synchronised": nn.SyncBatchNorm(features),
            }[change].to(device, torch.float64),
        )
    x = Shape().input().double().to(device)
    dy = output_gradient(sequence, x)
    assert_same(results(sequence, x, dy), results(one_by_one(sequence), x, dy), rtol=1e-9, atol=1e-9)


@pytest.mark.one_isa
def test_eval_and_modules_of_other_kinds(device):
    sequence = DepthwiseSeparableSequence(
        Shape().block(), Shape(c=17, c_out=13).block(), nn.MaxPool2d(2), Shape().block(), Shape(c=17).block(), nn.ReLU()
    ).to(device)
    x = Shape().input().to(device)
    for training in (True, False):
        sequence.train(training)
        dy = output_gradient(sequence, x)
        expected = results(one_by_one(sequence), x, dy)
        assert_same(results(sequence, x, dy), expected, rtol=2e-4, atol=2e-4)
    assert not sequence(x).isnan().any()
    assert torch.equal(DepthwiseSeparableSequence()(x), x)
    assert list(sequence.state_dict()) == list(one_by_one(sequence).state_dict())


@pytest.mark.one_isa
def test_hooks_and_subclasses_see_tensors(device):
    class Louder(DepthwiseSeparableConvBN2d):
        def forward(self, input):
            return 2 * super().forward(input)

    sequence = sequence_of(Shape(), Shape(c=17, c_out=13), Shape(), dtype=torch.float64)
    sequence.append(Louder(17, 13, 3, padding=1, dtype=torch.float64))
    sequence.append(Shape().block(dtype=torch.float64)).to(device)
    x = Shape().input().double().to(device)
    seen = []
    handles = [
        sequence[1].register_forward_hook(lambda module, args, out: seen.append((args[0].shape, out.shape))),
        sequence[2].register_full_backward_hook(lambda module, grads, _: seen.append(grads[0].shape)),
    ]
    expected_in = one_by_one(sequence)[0](x)
    out = sequence(x)
    out.square().sum().backward()
    assert seen[0] == (expected_in.shape, (3, 13, 13, 11))
    assert seen[1] == (3, 13, 13, 11)
    for handle in handles:
        handle.remove()
    dy = output_gradient(sequence, x)
    assert_same(results(sequence, x, dy), results(one_by_one(sequence), x, dy), rtol=1e-9, atol=1e-9)


@pytest.mark.one_isa
def test_only_what_requires_a_gradient_gets_one(device):
    sequence = sequence_of(Shape(), Shape(c=17, c_out=13), dtype=torch.float64).to(device)
    x = Shape().input().double().to(device)
    dy = output_gradient(sequence, x)
    every = results(sequence, x, dy)
    for name in ("0.depthwise.weight", "0.bn2.weight", "1.bn1.bias", "1.pointwise.weight"):
        for other, p in sequence.named_parameters():
            p.requires_grad_(other == name)
        (grad,) = torch.autograd.grad(sequence(x), [sequence.get_parameter(name)], dy)
        torch.testing.assert_close(grad, every[f"grad {name}"])
    sequence.requires_grad_(False)
    assert not sequence(x).requires_grad


@pytest.mark.one_isa
def test_autocast(device):
    sequence = sequence_of(Shape(n=4, h=16, w=16), Shape(c=17, c_out=13)).to(device)
    x = Shape(n=4, h=16, w=16).input().to(device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out, expected = sequence(x), one_by_one(sequence)(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected.float(), rtol=0.05, atol=0.05)
    out.float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 for p in sequence.parameters())


@pytest.mark.one_isa
def test_copies_pickles_and_checkpoints(device):
    from torch.utils.checkpoint import checkpoint

    sequence = sequence_of(Shape(), Shape(c=17, c_out=13)).to(device)
    x = Shape().input().to(device)
    dy = output_gradient(sequence, x)
    expected = results(sequence, x, dy)
    for other in (copy.deepcopy(sequence), pickle.loads(pickle.dumps(sequence))):
        assert all(torch.equal(value, expected[name]) for name, value in results(other, x, dy).items())
    x.requires_grad_()
    out = checkpoint(copy.deepcopy(sequence), x, use_reentrant=False)
    (grad,) = torch.autograd.grad(out, x, dy)
    assert torch.equal(grad, expected["grad x"])


@pytest.mark.one_isa
def test_further_derivatives_are_refused_in_a_sentence(device):
    sequence, x = sequence_of(Shape(), Shape(c=17)).to(device), Shape().input().to(device).requires_grad_()
    (grad,) = torch.autograd.grad(sequence(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        grad.sum().backward()


@pytest.mark.one_isa
def test_compiled(device):
    sequence = sequence_of(Shape(out_activation="silu"), Shape(c=17, c_out=13)).to(device)
    x = Shape().input().to(device)
    dy = output_gradient(sequence, x)
    expected = results(sequence, x, dy)
    other = copy.deepcopy(sequence)
    x = x.requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = torch.compile(other)(x)
        grads = torch.autograd.grad(out, [x, *other.parameters()], dy)
    torch.testing.assert_close(out, expected["out"])
    for name, grad in zip(["x", *dict(other.named_parameters())], grads, strict=True):
        torch.testing.assert_close(grad, expected[f"grad {name}"])


# ---- what is kept for backward ---------------------------------------------------------------------------------------


@pytest.mark.one_isa
@pytest.mark.parametrize("activation", ["relu", "relu6", "silu"])
def test_bytes_kept_over_mobilenet(activation, isa, device):
    """One tensor a block: at most 30 % of what stock modules keep, 34 % with ReLU, of which PyTorch keeps the output
    alone; and kept_bytes() says what is measured."""
    if isa == "emulated":
        pytest.skip("says the same on every backend, and takes long on this one")
    torch.manual_seed(0)
    sequence = DepthwiseSeparableSequence(
        *(
            DepthwiseSeparableConvBN2d(c_in, c_out, 3, stride, 1, activation=activation, out_activation=activation)
            for c_in, c_out, stride, _ in MOBILENET
        )
    ).to(device)
    x = torch.randn(2, 32, 56, 56, device=device, requires_grad=True)
    plain = nn.Sequential(*(Plain(block) for block in sequence))
    blocks = one_by_one(sequence)
    counted = sequence.kept_bytes(x.shape)
    measured = [saved_bytes(module, partial(module, x)) for module in (plain, blocks, sequence)]
    # What is not counted: vectors of the channels, and statistics that PyTorch keeps.
    for value, number in zip(measured, (counted.plain, counted.blocks, counted.chain), strict=True):
        assert number <= value <= number + 32 * 4 * sum(c_in + c_out for c_in, c_out, *_ in MOBILENET)
    assert measured[2] <= (0.34 if activation == "relu" else 0.30) * measured[0]


@pytest.mark.one_isa
def test_kept_bytes_without_a_first_norm(device):
    """As in Xception: nothing between the convolutions, and a chain all the same."""
    sequence = DepthwiseSeparableSequence(
        *(
            DepthwiseSeparableConvBN2d(16, 16, 3, padding=1, activation="identity", out_activation=out)
            for out in ("relu", "relu", "identity")
        )
    ).to(device)
    x = torch.randn(2, 16, 24, 24, device=device, requires_grad=True)
    for without in (False, True):
        plain = nn.Sequential(*(Plain(block) for block in sequence))
        counted = sequence.kept_bytes(x.shape)
        for number, module in ((counted.plain, plain), (counted.chain, sequence)):
            assert number <= saved_bytes(module, partial(module, x)) <= number + 32 * 4 * 6 * 16
        assert counted.chain == 4 * x.nbytes
        assert counted.plain == (9 if without else 12) * x.nbytes
        for block in sequence:
            block.bn1 = nn.Identity()


@pytest.mark.one_isa
def test_kept_bytes_of_what_is_not_joined(device):
    sequence = sequence_of(Shape(), Shape(c=17, c_out=13), Shape()).to(device)
    joined = sequence.kept_bytes((2, 13, 8, 8))
    assert joined.chain == 4 * 2 * 64 * (13 + 17 + 13 + 17)
    sequence[0].bn2.eval()
    assert sequence.kept_bytes((2, 13, 8, 8)).chain == joined.chain + 4 * 2 * 64 * 17
    assert sequence.kept_bytes((2, 13, 8, 8), torch.bfloat16).plain * 2 == joined.plain
    sequence.append(nn.ReLU())
    with pytest.raises(TypeError, match=r"module 3 must be a .*, got ReLU"):
        sequence.kept_bytes((2, 13, 8, 8))


def test_exported_name():
    assert "DepthwiseSeparableSequence" in dsconv_cuda.__all__
