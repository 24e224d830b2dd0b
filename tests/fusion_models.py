"""Small models with chains of every kind, for the tests of fuse(), and what tells two of them apart."""

import collections
import copy

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

# ---- models ----------------------------------------------------------------------------------------------------------


def depthwise(channels=8, kernel=3, stride=1, bias=False, **kwargs):
    return nn.Conv2d(channels, channels, kernel, stride, kernel // 2, groups=channels, bias=bias, **kwargs)


def mobilenet_v1():
    return nn.Sequential(depthwise(stride=2), nn.BatchNorm2d(8), nn.ReLU6(), *pointwise(), nn.ReLU6(inplace=True))


def pointwise(channels=8, out=12):
    return nn.Conv2d(channels, out, 1, bias=False), nn.BatchNorm2d(out)


class InvertedResidual(nn.Module):
    """MobileNetV2's block; the depthwise half is a module of its own."""

    def __init__(self):
        super().__init__()
        expand = nn.Sequential(nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6(inplace=True))
        middle = nn.Sequential(depthwise(16), nn.BatchNorm2d(16), nn.ReLU6(inplace=True))
        self.conv = nn.Sequential(expand, middle, *pointwise(16, 8))

    def forward(self, x):
        return x + self.conv(x)


class ShuffleUnit(nn.Module):
    """ShuffleNetV2's strided unit: no activation after the depthwise convolutions, two branches."""

    def __init__(self):
        super().__init__()
        self.left = nn.Sequential(depthwise(8, stride=2), nn.BatchNorm2d(8), *pointwise(8, 8), nn.ReLU(inplace=True))
        self.right = nn.Sequential(
            *pointwise(8, 8),
            nn.ReLU(inplace=True),
            depthwise(8, 5, stride=2),
            nn.BatchNorm2d(8),
            *pointwise(8, 8),
            nn.ReLU(inplace=True),
        )

    def forward(self, x):
        return torch.cat([self.left(x), self.right(x)], dim=1)


class Conformer(nn.Module):
    """The convolution module of a Conformer (arXiv:2005.08100, figure 2), behind a change of the layout."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.layers = nn.Sequential(
            nn.Conv1d(8, 16, 1),
            nn.GLU(dim=1),
            nn.Conv1d(8, 8, 7, padding=3, groups=8),
            nn.BatchNorm1d(8),
            nn.SiLU(),
            nn.Conv1d(8, 8, 1),
            nn.Dropout(0.0),
        )

    def forward(self, x):
        return x + self.layers(self.norm(x.mT).mT)


def quartznet():
    """A block of QuartzNet (arXiv:1910.10261) with two repetitions."""

    def part(channels, out, kernel):
        convolutions = (
            nn.Conv1d(channels, channels, kernel, padding="same", groups=channels, bias=False),
            nn.Conv1d(channels, out, 1, bias=False),
        )
        return *convolutions, nn.BatchNorm1d(out), nn.ReLU()

    return nn.Sequential(*part(8, 12, 33), *part(12, 8, 6))


class X3D(nn.Module):
    """The bottleneck of X3D (arXiv:2004.04730, table 1) without squeeze-excite: as every second one has it."""

    def __init__(self):
        super().__init__()
        self.a = nn.Sequential(nn.Conv3d(8, 18, 1, bias=False), nn.BatchNorm3d(18), nn.ReLU(inplace=True))
        self.b = nn.Sequential(
            nn.Conv3d(18, 18, 3, (1, 2, 2), padding=1, groups=18, bias=False), nn.BatchNorm3d(18), nn.SiLU(inplace=True)
        )
        self.c = nn.Sequential(nn.Conv3d(18, 8, 1, bias=False), nn.BatchNorm3d(8))
        self.shortcut = nn.Conv3d(8, 8, 1, (1, 2, 2))

    def forward(self, x):
        return F.relu(self.c(self.b(self.a(x))) + self.shortcut(x))


class FunctionalVolume(nn.Module):
    def __init__(self):
        super().__init__()
        self.dw, self.norm = nn.Conv3d(8, 16, (1, 3, 3), padding=(0, 1, 1), groups=8), nn.BatchNorm3d(16)
        self.pw = nn.Conv3d(16, 6, 1)

    def forward(self, x):
        return F.silu(self.pw(F.hardswish(self.norm(self.dw(x)))))


def xception():
    return nn.Sequential(nn.ReLU(), depthwise(), *pointwise(), nn.ReLU(), depthwise(12), *pointwise(12))


def with_biases():
    return nn.Sequential(depthwise(kernel=5, bias=True), nn.GELU(), nn.Conv2d(8, 6, 1), nn.Hardswish())


class DataDependent(nn.Module):
    """Cannot be traced; the parts of it can."""

    def __init__(self):
        super().__init__()
        self.block = mobilenet_v1()

    def forward(self, x):
        return self.block(x) if x.sum() > -1e9 else x


class Switched(nn.Module):
    """An argument with a default, and an output that only training has."""

    def __init__(self):
        super().__init__()
        self.block, self.auxiliary = mobilenet_v1(), nn.Conv2d(12, 2, 1)

    def forward(self, x, mask=None):
        y = self.block(x)
        if mask is not None:
            y = y * mask
        return torch.cat([y, self.auxiliary(y)], 1) if self.training else y


class Functional(nn.Module):
    """Activations as functions and one module for all, as tutorials write it; two chains, and a dropout by function."""

    def __init__(self):
        super().__init__()
        self.dw1, self.bn1, self.pw1, self.bn2 = depthwise(), nn.BatchNorm2d(8), *pointwise()
        self.dw2, self.pw2, self.relu = depthwise(12, bias=True), nn.Conv2d(12, 12, 1), nn.ReLU(inplace=True)

    def forward(self, x):
        x = F.relu6(self.bn1(self.dw1(x)))
        x = F.silu(self.bn2(self.pw1(x)))
        x = F.dropout(x, 0.5, training=self.training and False)
        return self.relu(self.pw2(self.relu(self.dw2(x)))) + x


class FunctionalInside(nn.Module):
    """The module that is rewritten is deep in the model, and the halves of the chain are in modules of their own."""

    class Half(nn.Module):
        def __init__(self, *layers):
            super().__init__()
            self.conv, self.bn = layers

        def forward(self, x):
            return self.bn(self.conv(x)).relu()

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Sequential(self.Half(depthwise(), nn.BatchNorm2d(8)), self.Half(*pointwise())))

    def forward(self, x, scale=2):
        return self.net(x) * scale


MODELS = {
    "mobilenet_v1": (mobilenet_v1, 1),
    "mobilenet_v2": (InvertedResidual, 1),
    "shufflenet": (ShuffleUnit, 2),
    "xception": (xception, 2),
    "with_biases": (with_biases, 1),
    "data_dependent": (DataDependent, 1),
    "switched": (Switched, 1),
    "functional": (Functional, 2),
    "functional_inside": (FunctionalInside, 1),
    "conformer": (Conformer, 1),
    "quartznet": (quartznet, 2),
    "x3d": (X3D, 1),
    "functional_volume": (FunctionalVolume, 1),
}


def build(name: str, device="cpu", dtype=torch.float32) -> nn.Module:
    return randomized(MODELS[name][0]()).to(device, dtype)


def randomized(model: nn.Module) -> nn.Module:
    """BatchNorm that is far from the identity."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.2, 2)
            nn.init.normal_(module.weight, 1, 0.3)
            nn.init.normal_(module.bias, std=0.3)
    return model


_IMAGES = {"conformer": (40,), "quartznet": (40,), "x3d": (4, 9, 11), "functional_volume": (4, 9, 11)}


def image(device="cpu", dtype=torch.float32, name: str | None = None) -> torch.Tensor:
    """An input of the model `name`; without a name, one for those in two dimensions."""
    return torch.randn(2, 8, *_IMAGES.get(name, (19, 21)), device=device, dtype=dtype)


# ---- what ran --------------------------------------------------------------------------------------------------------


class Calls(TorchDispatchMode):
    """Counts the operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names[str(function).rsplit(".", 1)[0]] += 1
        return function(*args, **(kwargs or {}))

    @property
    def fused(self):
        made = ("fwd", "fwd_with_pre", "fwd_kept", "fwd_norm", "fwd_gated")
        return sum(self.names[f"dsconv_cuda.{name}"] for name in made)

    @property
    def normalized(self):
        return sum(n for name, n in self.names.items() if "batch_norm" in name)


def calls(model: nn.Module, *args) -> Calls:
    with Calls() as counted, torch.no_grad():
        model(*args)
    return counted


def results(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The output, the gradient of the input, those of the parameters in one, and the buffers afterwards in one."""
    x = x.detach().requires_grad_()
    y = model(x)
    dy = torch.linspace(-1, 1, y.numel(), device=y.device, dtype=torch.float64).view_as(y).to(y.dtype)
    dx, *grads = torch.autograd.grad(y, [x, *model.parameters()], dy, allow_unused=True)
    flat = [
        torch.cat([t.flatten() for t in ts if t is not None] or [y.new_empty(0)]) for ts in (grads, model.buffers())
    ]
    return [y.detach(), dx, flat[0], flat[1].clone()]


_CHANNELS_LAST = {4: (torch.channels_last,), 5: (torch.channels_last_3d,)}


def assert_as_precise(model: nn.Module, fused: nn.Module, x: torch.Tensor):
    """Everything is at most twice as far from float64 as the original is, in the layout that suits that less."""
    exact = results(copy.deepcopy(model).double(), x.double())
    stock = [
        results(copy.deepcopy(model), x.contiguous(memory_format=f))
        for f in (torch.contiguous_format, *_CHANNELS_LAST.get(x.dim(), ()))
    ]
    mine = results(copy.deepcopy(fused), x)
    eps = torch.finfo(x.dtype).eps
    for actual, *references, oracle in zip(mine, *stock, exact, strict=True):
        off = [torch.linalg.vector_norm(t.double() - oracle) for t in (actual, *references)]
        assert off[0] <= 2 * max(off[1:]) + eps * torch.linalg.vector_norm(oracle)
