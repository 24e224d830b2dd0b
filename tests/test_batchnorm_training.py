"""A plain training step in two ops gives bit for bit what the ops give one by one; all else is left to them."""

import copy

import pytest
import torch
from torch import nn

from dsconv_cuda import (
    DepthwiseSeparableConvBN1d,
    DepthwiseSeparableConvBN2d,
    DepthwiseSeparableSequence,
    batchnorm_training,
)
from dsconv_cuda._loader import has_kernel, load_library


@pytest.fixture(autouse=True)
def _kernels(device):
    load_library()
    if device.type != "cpu" or not has_kernel("train_fwd", "CPU"):
        pytest.skip("the CPU's own kernels alone have these ops")


@pytest.fixture
def steps(monkeypatch):
    """The results of batchnorm_training.step, one for each call."""
    made, step = [], batchnorm_training.step

    def watched(*args, **kwargs):
        made.append(step(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(batchnorm_training, "step", watched)
    return made


def block(c_in=6, c_out=10, **arguments):
    torch.manual_seed(1)
    made = DepthwiseSeparableConvBN2d(c_in, c_out, 3, padding=1, **arguments)
    for norm in (made.bn1, made.bn2):
        if norm.affine:
            nn.init.uniform_(norm.weight, 0.5, 2)
            nn.init.uniform_(norm.bias, -1, 1)
    return made


def without_affine_and_tracking():
    made = block()
    made.bn1 = nn.BatchNorm2d(6, affine=False)
    made.bn2 = nn.BatchNorm2d(10, track_running_stats=False)
    return made


def frozen_parameters():
    made = block(bias=True)
    for parameter in (made.depthwise.weight, made.pointwise.bias, made.bn1.weight, made.bn2.bias):
        parameter.requires_grad_(False)
    return made


def float16_beside_float32():
    made = block(bias=True, dtype=torch.float16)
    made.bn1.float(), made.bn2.float()
    return made


MODELS = {
    "plain": block,
    "with biases": lambda: block(bias=True, stride=2, activation="silu", out_activation="identity"),
    "with a channel multiplier": lambda: block(channel_multiplier=2, dilation=2),
    "recomputed": lambda: block(recompute_output=True),
    "float64": lambda: block(dtype=torch.float64),
    "bfloat16": lambda: block(dtype=torch.bfloat16, activation="silu"),
    "float16, norms in float32": float16_beside_float32,
    "without affine, without statistics": without_affine_and_tracking,
    "frozen parameters": frozen_parameters,
    "a chain": lambda: DepthwiseSeparableSequence(block(), block(10, 7, activation="relu6"), block(7, 5)),
}


def step_of(model, x, dy, one_by_one, monkeypatch):
    """All that a step of training makes: output, gradients, buffers."""
    model, x = copy.deepcopy(model), x.clone().requires_grad_()
    with monkeypatch.context() as patch:
        if one_by_one:
            patch.setattr(batchnorm_training, "step", lambda *args, **kwargs: None)
        y = model(x)
        parameters = [p for p in model.parameters() if p.requires_grad]
        grads = torch.autograd.grad(y, [x, *parameters], dy(y))
    return y, *grads, *model.buffers()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_same_bits_as_one_by_one(name, channels_last, steps, monkeypatch):
    model = MODELS[name]()
    x = torch.randn(3, 6, 9, 8, dtype=next(model.parameters()).dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    _assert_same_bits(model, x, steps, monkeypatch)


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_same_bits_under_autocast(dtype, dims, steps, monkeypatch):
    """Which casts the operands and leaves the norms in float32."""
    if dims == 1:
        model, x = DepthwiseSeparableConvBN1d(6, 10, 3, padding=1, bias=True), torch.randn(3, 6, 9)
    else:
        model, x = MODELS["a chain"](), torch.randn(3, 6, 9, 8)
    with torch.autocast("cpu", dtype):
        y = _assert_same_bits(model, x, steps, monkeypatch)
    assert y.dtype == dtype


def _assert_same_bits(model, x, steps, monkeypatch):
    def dy(y):
        return torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y.dtype)

    ours = step_of(model, x, dy, False, monkeypatch)
    assert steps
    assert all(made is not None for made in steps)
    theirs = step_of(model, x, dy, True, monkeypatch)
    for our, their in zip(ours, theirs, strict=True):
        assert (our.dtype, our.stride()) == (their.dtype, their.stride())
        assert torch.equal(our, their)
    return ours[0]


def test_running_statistics_count_as_written(steps):
    made = block()
    saved = (made.bn1.running_mean * torch.ones((), requires_grad=True)).sum() * made.bn1.running_mean.sum()
    made(torch.randn(2, 6, 5, 5))
    assert steps[0] is not None
    assert made.bn1.running_mean._version > 0
    assert made.bn2.num_batches_tracked._version > 0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.backward()


def momentum_of_all_batches(made):
    made.bn1.momentum = None


def frozen(made):
    made.bn2.eval()


def parametrized(made):
    nn.utils.parametrizations.weight_norm(made.depthwise)


@pytest.mark.parametrize("change", [momentum_of_all_batches, frozen, parametrized])
def test_left_to_one_by_one(change, steps):
    made = block()
    change(made)
    x = torch.randn(2, 6, 5, 5, dtype=made.pointwise.weight.dtype)
    made(x).sum().backward()
    assert all(step is None for step in steps)


def test_refusals_change_nothing_and_say_why(steps):
    made = block()
    before = copy.deepcopy(made.state_dict())
    for x, error, message in (
        (torch.randn(2, 5, 4, 4), ValueError, "input must have 6 channels, as many as .depthwise takes, got 5"),
        (torch.randn(2, 6, 4, 4).double(), TypeError, "must have the dtype of input"),
        (torch.randn(1, 6, 1, 1), ValueError, "more than 1 value per channel"),
    ):
        with pytest.raises(error, match=message):
            made(x)
    made.bn2.running_var = torch.ones(3)
    with pytest.raises(ValueError, match=r"bn2\.running_var must have shape"):
        made(torch.randn(2, 6, 4, 4))
    assert steps == [None] * 3
    made.bn2.running_var = before["bn2.running_var"].clone()
    assert all(torch.equal(t, before[name]) for name, t in made.state_dict().items())


def test_second_derivative_is_refused():
    made = block()
    (grad,) = torch.autograd.grad(
        made(torch.randn(2, 6, 5, 5)).square().sum(), made.pointwise.weight, create_graph=True
    )
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        grad.sum().backward()
