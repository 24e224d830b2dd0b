"""Chains with squeeze-excite between the activation and the pointwise convolution: against the same modules one by one,
in the budget of oracle.py; which modules are taken for a gate; and that training keeps nothing of the size of z."""

import copy
import io
import itertools
import pickle
import random
import threading
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from fusion_models import assert_as_precise, randomized
from guarded import InputsEndAtPages
from shapes import described, identify
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

from dsconv_cuda import BatchNormArguments, explain_fusion, fuse, gated, unfuse
from dsconv_cuda.activations import ACTIVATIONS
from dsconv_cuda.batchnorm import block_of_chain
from dsconv_cuda.fusion.chain import chain_of
from dsconv_cuda.fusion.gates import gate_of

pytestmark = pytest.mark.usefixtures("isa")


@pytest.fixture(autouse=True)
def _kernels():
    if not gated.kernels_loaded():
        pytest.skip("there are no such kernels: the modules run one by one")


_CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_MODULES = {
    "identity": nn.Identity, "relu": nn.ReLU, "relu6": nn.ReLU6, "leaky_relu": nn.LeakyReLU, "silu": nn.SiLU,
    "hardswish": nn.Hardswish, "gelu": nn.GELU, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "hardsigmoid": nn.Hardsigmoid,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
}  # fmt: skip


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int, squeezed: int = 5, dims: int = 2):
        super().__init__()
        self.axes = tuple(range(2, dims + 2))
        self.fc1 = _CONVOLUTIONS[dims](channels, squeezed, 1)
        self.fc2 = _CONVOLUTIONS[dims](squeezed, channels, 1)

    def forward(self, x):
        return x * self.fc2(F.silu(self.fc1(x.mean(self.axes, keepdim=True)))).sigmoid()


@dataclass(frozen=True)
class Shape:
    n: int = 3
    c: int = 13
    multiplier: int = 1
    c_out: int = 17
    image: tuple = (13, 11)
    kernel: int = 3
    stride: int = 1
    bias: bool = True
    activation: str = "silu"
    out_activation: str = "identity"

    def __str__(self):
        return described(self)

    def model(self, norms: tuple[bool, bool] = (True, True)) -> nn.Sequential:
        dims, c_mid = len(self.image), self.c * self.multiplier
        geometry = (self.kernel, self.stride, self.kernel // 2)
        conv, norm = _CONVOLUTIONS[dims], _NORMS[dims]
        return randomized(
            nn.Sequential(
                conv(self.c, c_mid, *geometry, groups=self.c, bias=self.bias),
                norm(c_mid) if norms[0] else nn.Identity(),
                _MODULES[self.activation](),
                SqueezeExcite(c_mid, dims=dims),
                conv(c_mid, self.c_out, 1, bias=self.bias),
                norm(self.c_out) if norms[1] else nn.Identity(),
                _MODULES[self.out_activation](),
            )
        )

    def input(self, channels_last: bool = False) -> torch.Tensor:
        x = 3 * torch.randn(self.n, self.c, *self.image) + 1
        return x.contiguous(memory_format=_CHANNELS_LAST[len(self.image)]) if channels_last else x


_CHANNELS_LAST = {1: torch.contiguous_format, 2: torch.channels_last, 3: torch.channels_last_3d}


def results(model: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> dict[str, torch.Tensor]:
    model, x = copy.deepcopy(model), x.detach().requires_grad_()
    y = model(x)
    named = dict(model.named_parameters())
    grads = torch.autograd.grad(y, [x, *named.values()], dy, allow_unused=True)  # of a gate that has more than it uses
    found = {"y": y.detach(), "grad x": grads[0]} | dict(zip(named, grads[1:], strict=True))
    found = {name: value for name, value in found.items() if value is not None}
    return found | {name: buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()}


def stock_in_several_orders(model: nn.Module, x: torch.Tensor, dy: torch.Tensor):
    formats = (torch.contiguous_format, _CHANNELS_LAST[x.dim() - 2])
    for memory_format, flipped in itertools.product(formats, (False, True)):
        turn = (lambda t: t.flip(0)) if flipped else (lambda t: t)
        found = results(model, turn(x).contiguous(memory_format=memory_format), turn(dy))
        yield found | {name: turn(found[name]) for name in ("y", "grad x")}


def check(model: nn.Module, x: torch.Tensor) -> None:
    """A step of the fused model, whose kernels may not touch the memory behind what they read; within twice the error
    of the modules one by one in the same dtype."""
    fused = fuse(model)
    assert [f.reason.count("squeeze-excite") for f in explain_fusion(model)] == [1]
    with torch.no_grad():
        dy = torch.randn_like(copy.deepcopy(model)(x))
    with InputsEndAtPages():
        actual = results(fused, x, dy)
    exact = results(copy.deepcopy(model).double(), x.double(), dy.double())
    dtype = x.dtype
    measured = torch.float32 if dtype == torch.float64 else dtype
    eps, scale = torch.finfo(dtype).eps, torch.finfo(dtype).eps / torch.finfo(measured).eps
    arguments = copy.deepcopy(model).to(measured), x.to(measured), dy.to(measured)
    others = list(stock_in_several_orders(*arguments))
    with torch.backends.mkldnn.flags(enabled=False):  # PyTorch's own convolutions sum in other orders than oneDNN's
        others += stock_in_several_orders(*arguments)
    for name, oracle in exact.items():
        own = scale * max(difference(found[name], oracle) for found in others)
        budget = (3 if dtype == torch.float64 else 2) * own + eps * oracle.abs().max().item()
        off = difference(actual[name], oracle)
        assert off <= budget, f"{name} is off by {off:.3g}, allowed is {budget:.3g}"


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a.double() - b.double()).abs().max().item()


SHAPES = [
    Shape(),
    Shape(n=2, c=33, c_out=40, image=(14, 14), stride=2, activation="gelu", out_activation="silu"),
    Shape(n=1, c=64, c_out=96, image=(28, 28), kernel=5, activation="hardswish"),
    Shape(c=3, multiplier=3, c_out=17, image=(11, 13), activation="tanh"),
    Shape(c=8, multiplier=2, c_out=4, image=(12, 12), stride=2, activation="identity", out_activation="tanh"),
    # by planes, where z is nchw: of steps of 1 and of 2, with a rest of a vector
    Shape(n=2, c=19, c_out=24, image=(61, 63), bias=False),
    Shape(n=2, c=16, c_out=24, image=(70, 77), stride=2),
    # many channels on few pixels: backward goes by panels of them, in one tile of pixels and in several
    Shape(n=1, c=272, c_out=100, image=(14, 14)),
    Shape(n=5, c=260, c_out=180, image=(7, 7), activation="sigmoid"),
    Shape(n=3, c=2, c_out=3, image=(7, 5), kernel=1),
    Shape(n=6, c=9, c_out=7, image=(1, 1)),  # of two values a channel their norm leaves little but rounding errors
    Shape(n=2, c=20, c_out=11, image=(40,), kernel=7),
    Shape(n=2, c=18, c_out=8, image=(5, 9, 8), activation="leaky_relu", out_activation="sigmoid"),
]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_training(shape, channels_last):
    check(shape.model(), shape.input(channels_last))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=identify)
def test_dtypes_where_nothing_is_kept(dtype, channels_last, monkeypatch):
    """By planes in nchw, where bfloat16 multiplies pairs of channels."""
    monkeypatch.setattr(gated, "_MOST_KEPT", 0)
    for shape in (SHAPES[1], SHAPES[5], SHAPES[6], SHAPES[7]):
        check(shape.model().to(dtype), shape.input(channels_last).to(dtype))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("kept", [False, True])
def test_means_that_keep_what_they_are_of_and_those_that_do_not(kept, channels_last, monkeypatch):
    monkeypatch.setattr(gated, "_MOST_KEPT", 16 << 20 if kept else 0)
    for shape in (SHAPES[1], SHAPES[5], SHAPES[6], SHAPES[8], SHAPES[-1]):
        check(shape.model(), shape.input(channels_last))
        model, x = shape.model().eval(), shape.input(channels_last)
        with torch.no_grad():
            torch.testing.assert_close(fuse(model)(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=identify)
@pytest.mark.parametrize("channels_last", [False, True])
def test_dtypes(dtype, channels_last):
    for shape in (SHAPES[1], SHAPES[5], SHAPES[7]):
        check(shape.model().to(dtype), shape.input(channels_last).to(dtype))


@pytest.mark.parametrize("activation", sorted(_MODULES))
def test_activations(activation):
    assert _MODULES.keys() == ACTIVATIONS.keys()
    shape = Shape(n=2, c=21, c_out=6, image=(10, 9), activation=activation, out_activation="silu")
    check(shape.model(), shape.input(True))


def behind_a_norm(shape: Shape) -> nn.Sequential:
    """MBConv of EfficientNet, from its expanding convolution on."""
    dims = len(shape.image)
    before = _CONVOLUTIONS[dims](6, shape.c, 1, bias=False), _NORMS[dims](shape.c), nn.SiLU(inplace=True)
    return randomized(nn.Sequential(*before, *shape.model()))


@pytest.mark.one_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=identify)
@pytest.mark.parametrize("channels_last", [False, True])
def test_behind_a_norm_that_joins_the_chain(channels_last, dtype):
    for shape in (SHAPES[0], SHAPES[1], SHAPES[4], SHAPES[8], SHAPES[-1]):
        model, x = behind_a_norm(shape).to(dtype), replace(shape, c=6).input(channels_last).to(dtype)
        assert explain_fusion(model)[0].reason.startswith("BatchNorm -> silu -> depthwise")
        if dtype == torch.float32:
            check(model, x)
        elif dtype == torch.float64:
            check_close(model, fuse(model), x, rtol=1e-10, atol=1e-10)
        else:  # through three norms in 16 bits luck decides how far a single value is off
            assert_as_precise(model, fuse(model), x)
        with torch.no_grad():
            tolerance = {"rtol": 0.1, "atol": 0.1} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
            torch.testing.assert_close(fuse(model.eval())(x), model(x), **tolerance)


@pytest.mark.one_isa
def test_behind_a_norm_training_saves_one_tensor_of_the_size_of_z():
    shape = Shape(n=2, c=24, c_out=6, image=(40, 40))
    model, x = behind_a_norm(shape), replace(shape, c=6).input(True)
    z = 4 * x.numel()
    assert len(saved_sizes(model, x, z)) >= 7
    assert set(saved_sizes(fuse(model), x, z)) == {z}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        fuse(model)(x).sum().backward()
    assert len(set(kept)) < len(kept)  # what several keep is one tensor


@pytest.mark.one_isa
def test_behind_a_norm_whoever_asks_for_the_value_has_it():
    shape = Shape(n=2, c=8, c_out=6)
    model, x, seen = behind_a_norm(shape), replace(shape, c=6).input(), []
    fused = fuse(model)
    for of in (model, fused):
        of[2].register_forward_hook(lambda module, args, y: seen.append(y.detach().clone()))
    check_close(model, fused, x)
    for value in seen[1:]:
        torch.testing.assert_close(value, seen[0], rtol=1e-4, atol=1e-4)
    gradients = []
    for of in (model, fused):
        image = x.clone().requires_grad_()
        y = checkpoint(of[:5], image, use_reentrant=False)
        of[5:](y).square().sum().backward()
        gradients.append([image.grad, *(p.grad for p in of.parameters())])
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)


@pytest.mark.one_isa
@pytest.mark.parametrize("norms", list(itertools.product((True, False), repeat=2)), ids=str)
@pytest.mark.parametrize("frozen", [(), (1,), (5,), (1, 5)], ids=str)
def test_norms_that_are_absent_or_frozen(norms, frozen):
    shape = Shape(n=4, out_activation="silu")
    model = shape.model(norms)
    for index in frozen:
        model[index].eval()
    check(model, shape.input(True))


@pytest.mark.one_isa
@pytest.mark.parametrize("trained", ["0.weight", "3.fc1.weight", "4.weight", "1.bias", None])
@pytest.mark.parametrize("training", [False, True])
def test_a_gradient_of_one_thing_alone(trained, training):
    """Only what is asked for is computed; a gate that is trained alone is reached through weights that are kept."""
    shape = Shape()
    model, x = shape.model().train(training), shape.input()
    fused = fuse(model)
    gradients = []
    for of in (model, fused):
        for name, p in of.named_parameters():
            p.requires_grad_(name == trained)
        inputs = [of.get_parameter(trained)] if trained else [x.clone().requires_grad_()]
        y = of(x if trained else inputs[0])
        gradients.append(torch.autograd.grad(y.square().sum(), inputs)[0])
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)


@pytest.mark.one_isa
def test_training_saves_nothing_of_the_size_of_z():
    shape = Shape(n=2, c=24, c_out=8, image=(40, 40))
    model, x = shape.model(), shape.input(True)

    z, y = x.numel(), x.numel() // 3
    assert len(saved_sizes(model, x, z)) >= 5
    assert {y, z} == set(saved_sizes(fuse(model), x, y))  # y and the input


def saved_sizes(model, x, least: int) -> list[int]:
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        model(x.detach().requires_grad_())
    return [size for size in sizes if size >= least]


def test_the_same_bits_for_every_number_of_threads():
    """Behind a gate that has too: PyTorch's convolutions have not."""
    threads = torch.get_num_threads()
    try:
        for shape in (SHAPES[1], SHAPES[6], SHAPES[7], SHAPES[8]):
            model, x = shape.model(), shape.input(True)
            norm = BatchNormArguments(None, None, model[1].weight, model[1].bias, training=True)
            tensors = [x, model[0].weight, model[4].weight]
            arguments = (None, None, norm, None, shape.stride, shape.kernel // 2, 1, shape.activation, "identity")
            found = []
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                of = [t.detach().requires_grad_() for t in tensors]
                y = block_of_chain(2, *of, *arguments, gate=lambda means: 1 / (1 + means.square()))
                found.append([y, *torch.autograd.grad(y, of, torch.linspace(-1, 1, y.numel()).view_as(y))])
            for others in zip(*found, strict=True):
                assert all(torch.equal(others[0], other) for other in others[1:])
    finally:
        torch.set_num_threads(threads)


def test_the_mean_of_values_that_hardly_differ():
    """About 1e4 with a deviation of 1e-2: sums in blocks and in float64."""
    x = 1e4 + 1e-2 * torch.randn(2, 16, 56, 56)
    weight, pw = torch.ones(16, 1, 1, 1), torch.zeros(4, 16, 1, 1)
    for data in (x, x.contiguous(memory_format=torch.channels_last)):
        means, _ = torch.ops.dsconv_cuda.gate_means(data, weight, pw, None, None, [1] * 2, [0] * 4, [1] * 2, 0, False)
        torch.testing.assert_close(means.double(), x.double().mean((2, 3)), rtol=2**-23, atol=0)


# ---- which modules are gates -----------------------------------------------------------------------------------------


class _Gate(nn.Module):
    def __init__(self, channels=8):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.conv, self.spatial = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 3, padding=1)
        self.fc = nn.Sequential(nn.Linear(channels, 4), nn.ReLU(), nn.Linear(4, channels), nn.Sigmoid())


def Gate(code) -> nn.Module:
    return type("Gate", (_Gate,), {"forward": code, "scale": 1.0})()


def _rows(self, x):
    n, c, _, _ = x.size()
    return x * self.fc(self.pool(x).view(n, c)).view(n, c, 1, 1).expand_as(x)


def _sizes_of_the_image(self, x):
    n, c, h, _ = x.size()
    return x * (self.fc(self.pool(x).view(n, c)) * h).view(n, c, 1, 1)


GATES = {
    "pool": lambda self, x: x * self.conv(self.pool(x)).sigmoid(),
    "the other way round": lambda self, x: torch.mul(self.conv(F.adaptive_avg_pool2d(x, (1, 1))), x),
    "mean": lambda self, x: x * torch.sigmoid(self.conv(x.mean((-1, -2), keepdim=True))),
    "torch.mean": lambda self, x: x * self.conv(torch.mean(x, dim=[2, 3], keepdim=True)),
    "linear": _rows,
    "linear of a mean": lambda self, x: x * self.fc(x.mean(dim=(2, 3)))[:, :, None, None],
    "in place": lambda self, x: x.mul_(self.conv(self.pool(x)).sigmoid()),
    "shape": lambda self, x: x * self.fc(self.pool(x).reshape(x.shape[0], -1)).view(x.shape[0], x.shape[1], 1, 1),
}
OTHERS = {
    "spatial": lambda self, x: x * self.spatial(x).sigmoid(),
    "spread out": lambda self, x: x * self.spatial(self.conv(self.pool(x)).expand_as(x)),
    "maximum": lambda self, x: x * self.conv(F.adaptive_max_pool2d(x, 1)),
    "a larger pool": lambda self, x: x * F.interpolate(self.conv(F.adaptive_avg_pool2d(x, 2)), x.shape[2:]),
    "one axis": lambda self, x: x * x.mean(2, keepdim=True) + 0 * self.conv(x).sum(),
    "a sum": lambda self, x: x + x * self.conv(self.pool(x)),
    "twice": lambda self, x: x * self.conv(self.pool(x)) * 2,
    "size of the image": _sizes_of_the_image,
    "squared": lambda self, x: x * x * self.conv(self.pool(x)),
    "plus": lambda self, x: x + self.conv(self.pool(x)),
    "its own square": lambda self, x: x * x.expand_as(x) + 0 * self.conv(self.pool(x)).sum(),
    "x as its own factor": lambda self, x: x * x.expand_as(x),
    "without gradients": lambda self, x: x * self.conv(_detached_pool(self, x)),
    "own derivative": lambda self, x: x * _Round.apply(self.conv(self.pool(x))),
    "own derivative of a known function": lambda self, x: x * _OwnSigmoid.apply(self.conv(self.pool(x))),
    "own buffer": lambda self, x: x * self.conv(self.pool(x)) / self.temperature.item(),
    "own parameter": lambda self, x: x * (self.conv(self.pool(x)) + self.position),
    "counts": lambda self, x: x * self.conv(self.pool(x)) * _count(self),
    "counts later": lambda self, x: x * self.conv(self.pool(x)).mul(_count(self)),
    "keeps": lambda self, x: _keep(self, x * self.conv(self.pool(x))),
    "by chance": lambda self, x: x * (self.conv(self.pool(x)) if random.random() < 2 else 1),
    "another way for tensors": lambda self, x: (
        x * (self.conv(self.pool(x)) * (2 if isinstance(x, torch.Tensor) else 1))
    ),
    "another way without gradients": lambda self, x: x * (self.conv(self.pool(x)) * (1 + torch.is_grad_enabled())),
    "attributes": lambda self, x: x * self.conv(self.pool(x)).relu() * self.listed[0],
}


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def backward(ctx, grad):
        return grad


class _Round(_StraightThrough):
    @staticmethod
    def forward(ctx, x):
        return torch.round(x)


class _OwnSigmoid(_StraightThrough):
    @staticmethod
    def forward(ctx, x):
        return torch.sigmoid(x)


def _detached_pool(self, x):
    with torch.no_grad():
        return self.pool(x)


def _count(self):
    self.calls = getattr(self, "calls", 0) + 1
    return self.calls


def _keep(self, y):
    self.last = y.detach()
    return y


def _around(gate: nn.Module) -> nn.Sequential:
    depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
    return randomized(nn.Sequential(depthwise, nn.BatchNorm2d(8), nn.ReLU(), gate, nn.Conv2d(8, 6, 1)))


@pytest.mark.one_isa
@pytest.mark.parametrize("name", GATES)
def test_gates(name):
    model, x = _around(Gate(GATES[name])), torch.randn(2, 8, 9, 7)
    assert "squeeze-excite" in explain_fusion(model)[0].reason
    if name != "in place":  # with which PyTorch's own autograd cannot train
        check_close(model, fuse(model), x)
        check_close(model.eval(), fuse(model), x)
    with torch.no_grad():
        torch.testing.assert_close(fuse(model.eval())(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.one_isa
@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_gate(name):
    gate = Gate(OTHERS[name])
    if name == "own buffer":
        gate.register_buffer("temperature", torch.tensor(2.0))
    elif name == "own parameter":
        gate.position = nn.Parameter(torch.randn(1, 8, 9, 7))
    elif name == "attributes":
        gate.listed = [1.0]
    assert all(gate_of(gate, dims, 8) is None for dims in (1, 2, 3))
    assert not explain_fusion(_around(gate))[0].taken
    assert not hasattr(gate, "calls")


@pytest.mark.one_isa
def test_gates_that_change_run_one_by_one():
    """What the graph of a gate depends on is looked at in each call, also where the chain is called again quickly."""
    model, x = _around(Gate(GATES["pool"])), torch.randn(2, 8, 9, 7)
    changes = {
        "another pool": lambda gate: setattr(gate, "pool", nn.AdaptiveMaxPool2d(1)),
        "another size": lambda gate: setattr(gate.pool, "output_size", (9, 7)),
        "hook on the pool": lambda gate: gate.pool.register_forward_hook(lambda m, args, y: args[0].amax((2, 3), True)),
        "attribute": lambda gate: setattr(gate, "scale", 2.0),
        "class": lambda gate: parametrize.register_parametrization(gate, "weight", nn.Identity()),
    }
    for training, (name, change) in itertools.product((False, True), changes.items()):
        original = copy.deepcopy(model).train(training)
        fused = fuse(copy.deepcopy(original))
        with torch.no_grad():
            for _ in range(2):
                torch.testing.assert_close(fused(x), original(x), rtol=1e-4, atol=1e-4)
        assert one_operation(fused, x)
        for of in (original, fused):
            if name == "class":
                of[3].weight = nn.Parameter(torch.zeros(3))
            change(of[3])
        assert not one_operation(fused, x), name
        check_close(original, fused, x)
        check_close(original.train(not training), fused.train(not training), x)


@pytest.mark.one_isa
def test_threads_that_call_a_mode_for_the_first_time():
    for attempt in range(3):
        model = _around(Gate(GATES["pool"])).eval()
        fused, x, barrier, found = fuse(model), torch.randn(2, 8, 9, 7), threading.Barrier(4), []
        if attempt == 1:
            fused = pickle.loads(pickle.dumps(fuse(_around(_named()).eval())))
            model = unfuse(fused)

        def run(fused=fused, x=x, barrier=barrier, found=found):
            barrier.wait()
            with torch.no_grad():
                found.append(fused(x))

        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with torch.no_grad():
            assert len(found) == 4
            assert all(torch.allclose(y, model(x), rtol=1e-4, atol=1e-4) for y in found)


def _named() -> nn.Module:
    return SqueezeExcite(8)


@pytest.mark.one_isa
@pytest.mark.parametrize("training", [False, True])
def test_an_image_that_is_no_batch(training):
    gate = Gate(GATES["pool"])
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), gate, nn.Conv2d(8, 6, 1)).train(training)
    fused = fuse(model)
    check_close(model, fused, torch.randn(8, 9, 7))
    assert one_operation(fused, torch.randn(8, 9, 7))


def check_close(model, fused, x, **tolerance):
    tolerance = {"rtol": 1e-4, "atol": 1e-4} | tolerance
    with torch.no_grad():
        torch.testing.assert_close(copy.deepcopy(fused)(x), copy.deepcopy(model)(x), **tolerance)
    dy = torch.randn_like(copy.deepcopy(model)(x))
    theirs = results(model, x, dy)
    for name, value in results(fused, x, dy).items():
        name = name.removeprefix("_orig_mod.")  # of what torch.compile returns
        torch.testing.assert_close(value, theirs[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.one_isa
def test_an_activation_behind_the_gate_is_none_of_the_chain():
    gate = Gate(GATES["pool"])
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), gate, nn.ReLU(), nn.Conv2d(8, 6, 1))
    (finding,) = explain_fusion(model)
    assert not finding.taken
    assert "ReLU between" in finding.reason


# ---- with the rest of PyTorch ----------------------------------------------------------------------------------------


@pytest.fixture
def model():
    return Shape(n=2, c=8, c_out=6).model()


@pytest.fixture
def x():
    return Shape(n=2, c=8, c_out=6).input()


def one_operation(model, x) -> bool:
    """Whether a forward of the fused model is one; what its kernel of the means says."""
    called = []
    with torch.profiler.profile() as profile, torch.no_grad():
        copy.deepcopy(model)(x)
    called = [event.key for event in profile.key_averages()]
    return "dsconv_cuda::gate_means" in called


@pytest.mark.one_isa
@pytest.mark.parametrize("training", [False, True])
def test_copies_pickles_and_state_dicts(model, x, training):
    fused = fuse(model.train(training))
    assert fused.state_dict().keys() == model.state_dict().keys()
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), torch.load(file, weights_only=False)):
        assert one_operation(other, x)
        assert chain_of(other[0]).gate.module is other[3]
        assert other[3] is not fused[3]
        check_close(model, other, x)
        other.train(not training)
        check_close(copy.deepcopy(model).train(not training), other, x)
        check_close(model, unfuse(other).train(training), x)


@pytest.mark.one_isa
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("cut", [7, 3, 4])
def test_checkpoints(model, x, use_reentrant, cut):
    fused, gradients = fuse(copy.deepcopy(model)), []
    for of in (model, fused):
        image = x.clone().requires_grad_()
        y = checkpoint(of[:cut], image, use_reentrant=use_reentrant)
        of[cut:](y).square().sum().backward()
        gradients.append([image.grad, *(p.grad for p in of.parameters())])
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)


@pytest.mark.one_isa
def test_hooks_and_what_is_exchanged(model, x):
    """Hooks on the gate take the chain apart; its children are called, and so are their hooks."""
    seen = []
    handle = model.eval()[3].fc1.register_forward_hook(lambda module, args, y: seen.append(args[0].shape))
    fused = fuse(model)
    assert not seen
    handle.remove()
    handle = fused[3].fc1.register_forward_hook(lambda module, args, y: seen.append(args[0].shape))
    check_close(model, fused, x)
    assert set(seen) == {(2, 8, 1, 1)}
    assert one_operation(fused, x)
    handle.remove()
    handle = fused[3].register_forward_hook(lambda module, args, y: 2 * y)
    assert not one_operation(fused, x)
    with torch.no_grad():
        torch.testing.assert_close(fused[:4](x), 2 * model[:4](x))
    handle.remove()
    fused[3].fc2 = nn.Conv2d(5, 8, 1, bias=False)
    other = copy.deepcopy(model)
    other[3].fc2 = fused[3].fc2
    assert one_operation(fused, x)
    check_close(other, fused, x)
    parametrizations.weight_norm(fused[3].fc1)
    assert one_operation(fused, x)
    fused[3].axes = (2,)
    assert not one_operation(fused, x)
    fused[3].axes = (2, 3)
    fused[3] = nn.Identity()
    assert not one_operation(fused, x)


@pytest.mark.one_isa
@pytest.mark.parametrize("training", [False, True])
def test_autocast(model, x, training):
    fused = fuse(model.train(training))
    exact = copy.deepcopy(model).double()(x.double())
    with torch.autocast("cpu", torch.bfloat16):
        assert one_operation(fused, x)
        actual, expected = copy.deepcopy(fused)(x), copy.deepcopy(model)(x)
    assert actual.dtype == expected.dtype
    assert torch.linalg.vector_norm(actual - exact) <= 2 * torch.linalg.vector_norm(expected - exact)
    actual.float().square().mean().backward()


@pytest.mark.one_isa
def test_what_has_no_rule_runs_the_modules_one_by_one(model, x):
    fused = fuse(model.eval())
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(of):
        return lambda p: torch.func.functional_call(of, p, (x,)).square().sum()

    torch.testing.assert_close(torch.func.grad(loss(fused))(parameters), torch.func.grad(loss(model))(parameters))
    tangent = torch.randn_like(x)
    torch.testing.assert_close(torch.func.jvp(fused, (x,), (tangent,)), torch.func.jvp(model, (x,), (tangent,)))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        torch.testing.assert_close(fused(dual), model(dual))
    torch.testing.assert_close(torch.jit.trace(fused, x)(x), model(x), rtol=1e-4, atol=1e-4)
    exported = torch.export.export(fused, (x,)).module()
    torch.testing.assert_close(exported(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.one_isa
@pytest.mark.parametrize("training", [False, True])
def test_graphs_of_torch_compile_with_gradients(model, x, training):
    """Where the modules run one by one too: no graph break, and the same numbers."""
    fused = fuse(model.train(training))
    check_close(model, torch.compile(fused, fullgraph=True, backend="aot_eager"), x)


@pytest.mark.one_isa
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[3], SHAPES[-2], SHAPES[-1]], ids=str)
def test_graphs_of_torch_compile_without_gradients(shape):
    """The chain is two operations there, for images of every size."""
    torch._dynamo.reset()
    model, held = shape.model().eval(), []

    def backend(graph, inputs):
        held.append({str(node.target) for node in graph.graph.nodes})
        return graph

    compiled = torch.compile(fuse(model), fullgraph=True, dynamic=True, backend=backend)
    with torch.no_grad():
        for n, more in ((2, 0), (3, 4), (5, 2)):
            x = torch.randn(n, shape.c, *(size + more for size in shape.image))
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    assert len(held) == 1
    assert {"dsconv_cuda.gate_means", "dsconv_cuda.fwd_gated"} <= held[0]


@pytest.mark.one_isa
def test_inductor(model, x):
    torch._dynamo.reset()
    fused = torch.compile(fuse(model.eval()), fullgraph=True)
    with torch.inference_mode():
        torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.one_isa
def test_second_derivatives_are_refused(model, x):
    for training in (False, True):
        fused, image = fuse(copy.deepcopy(model).train(training)), x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(fused(image).square().sum(), image, create_graph=True)
        with pytest.raises(RuntimeError, match="double backward is not supported"):
            grad.sum().backward()


@pytest.mark.one_isa
def test_inference_mode_and_no_images(model, x):
    fused = fuse(model.eval())
    with torch.inference_mode():
        torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-4)
        assert fused(x[:0]).shape == model(x[:0]).shape
    image = x[:0].requires_grad_()
    fused(image).sum().backward()
    assert image.grad.shape == x[:0].shape
    assert all(not p.grad.any() for p in fused.parameters())


@pytest.mark.one_isa
def test_weights_that_change_are_folded_again(model, x):
    fused = fuse(model.eval())
    with torch.no_grad():
        for name in ("0.weight", "1.running_var", "3.fc1.weight", "3.fc2.bias", "4.weight", "5.bias"):
            model.state_dict()[name].mul_(1.5)
            torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.one_isa
def test_a_norm_that_trains_on_one_value_a_channel_raises(model):
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        fuse(model)(torch.randn(1, 8, 1, 1))


@pytest.mark.one_isa
@pytest.mark.parametrize(
    ("gate", "error", "message"),
    [
        (lambda means: means.repeat(1, 1, 2, 2), ValueError, r"must have shape \[2, 8, 1, 1\], got \[2, 8, 2, 2\]"),
        (lambda means: means[:, :5], ValueError, r"must have shape \[2, 8, 1, 1\]"),
        (lambda means: 1.0, TypeError, "must be a tensor, got float"),
    ],
)
def test_gates_of_other_shapes_raise(gate, error, message):
    weights = (torch.randn(2, 8, 5, 5), torch.randn(8, 1, 3, 3), torch.randn(4, 8, 1, 1), None, None)
    with pytest.raises(error, match=message):
        block_of_chain(2, *weights, None, None, 1, 1, 1, "relu", "identity", gate=gate)


@pytest.mark.one_isa
def test_a_gate_that_is_a_constant_or_broadcasts(x):
    weights = [x, torch.randn(8, 1, 3, 3), torch.randn(4, 8, 1, 1), torch.randn(8), torch.randn(4)]
    for gate in (torch.tensor(0.5), torch.rand(8, 1, 1), torch.rand(2, 8, 1, 1)):
        found = []
        for fused in (True, False):
            tensors = [t.detach().requires_grad_() for t in weights]
            if fused:
                y = block_of_chain(2, *tensors, None, None, 1, 1, 1, "silu", "tanh", gate=lambda means, g=gate: g)
            else:
                image, dw, pw, *biases = tensors
                a = F.silu(F.conv2d(image, dw, biases[0], padding=1, groups=8))
                y = F.conv2d(a * gate, pw, biases[1]).tanh()
            found.append([y, *torch.autograd.grad(y.square().sum(), tensors)])
        torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


@pytest.mark.one_isa
def test_shapes_are_different():
    """The table of shapes says what it means to: replace() of one is another."""
    assert len({*SHAPES, replace(SHAPES[0], c=14)}) == len(SHAPES) + 1
