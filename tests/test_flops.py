"""torch.utils.flop_counter: as many for the package's modules as for the stock ones that they stand for."""

import copy

import pytest
import torch
from fresh_process import run_python
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import dsconv_cuda
from dsconv_cuda import flops
from dsconv_cuda.activations import ACTIVATIONS

pytestmark = [pytest.mark.usefixtures("isa"), pytest.mark.one_isa]


class Stock(nn.Module):
    """The children of a module, called one after the other."""

    def __init__(self, module: nn.Module):
        super().__init__()
        for name, child in copy.deepcopy(module).named_children():
            setattr(self, name, child)
        self.functions = [ACTIVATIONS[name].value for name in (module.activation, module.out_activation)]

    def forward(self, x):
        norm1, norm2 = (getattr(self, name, nn.Identity()) for name in ("bn1", "bn2"))
        a = self.functions[0](norm1(self.depthwise(x)))
        return self.functions[1](norm2(self.pointwise(a)))


def _count(call) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def _same(module, stock, x):
    """Of a forward without gradients, and of a step in which each choice of tensors gets one."""
    forward = _count(lambda: stock(x))
    with torch.no_grad():
        for _ in range(2):
            assert _count(lambda: module(x)) == forward > 0
    # In training the sums for a first norm are always made, which takes the gradient of z; stock modules do that where
    # the norm is trained. In evaluation it is part of the depthwise weight.
    norm1 = ["bn1"] if hasattr(module, "bn1") and module.bn1.training else []
    groups = ([], ["depthwise"], ["pointwise", *norm1], ["depthwise", "pointwise", "bn1", "bn2"])
    for of_x in (False, True):
        for trained in groups:
            if not of_x and not trained:
                continue
            counts = []
            for net in (module, stock):
                for name, p in net.named_parameters():
                    p.requires_grad_(any(part in trained for part in name.split(".")))
                image = x.clone().requires_grad_(of_x)
                counts.append(_count(lambda net=net, image=image: net(image).sum().backward()))
            assert counts[0] == counts[1] > forward


KINDS = [(kind, dims) for kind in ("Conv", "ConvBN") for dims in (1, 2, 3)]


@pytest.mark.parametrize("kwargs", [{}, {"bias": True, "stride": 2, "channel_multiplier": 2, "out_activation": "silu"}])
@pytest.mark.parametrize(("kind", "dims"), KINDS)
def test_counts_are_those_of_the_two_convolutions(kind, dims, kwargs, device):
    module = getattr(dsconv_cuda, f"DepthwiseSeparable{kind}{dims}d")(4, 8, 3, padding=1, **kwargs).to(device)
    x = torch.randn(2, 4, *(8, 6, 7)[:dims], device=device)
    for train in (True, False):
        module.train(train)
        _same(module, Stock(module).train(train), x)


@pytest.mark.parametrize("frozen", ["bn1", "bn2"])
def test_blocks_with_a_frozen_norm(frozen, device):
    module = dsconv_cuda.DepthwiseSeparableConvBN2d(4, 8, 3, padding=1).to(device)
    getattr(module, frozen).eval()
    _same(module, Stock(module), torch.randn(2, 4, 9, 8, device=device))


def _step(net, x) -> int:
    return _count(lambda: net(x).sum().backward())


def test_mobilenet(device):
    net = dsconv_cuda.models.mobilenet_v1(0.25, 10).to(device)
    stock = copy.deepcopy(net)
    stock.blocks = nn.Sequential(*map(Stock, net.blocks))
    x = torch.randn(2, 3, 64, 64, device=device)
    for train in (True, False):
        assert _step(net.train(train), x) == _step(stock.train(train), x)


def test_what_is_fused(device):
    pair = nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8)
    stock = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), *pair).to(device)
    x = torch.randn(2, 3, 8, 8, device=device)
    for train in (True, False):
        fused = dsconv_cuda.fuse(stock.train(train))
        assert _step(fused, x) == _step(stock, x)
        with torch.no_grad():
            counts = {_count(lambda net=net: net(x)) for net in (fused, stock)}
        assert len(counts) == 1


def test_an_output_that_is_made_again_counts_twice(device):
    """As activation checkpointing does."""
    module = dsconv_cuda.DepthwiseSeparableConvBN2d(4, 8, 3).to(device)
    x = torch.randn(2, 4, 8, 8, device=device)
    once = _step(module, x)
    module.recompute_output = True
    assert _step(module, x) - once == _count(lambda: module(x))


def test_every_op_that_convolves_has_a_formula_of_its_arguments():
    dsconv_cuda.DepthwiseSeparableConv2d(4, 8, 3)(torch.randn(1, 4, 5, 5))  # loads the library
    schemas = {
        schema.name.removeprefix("dsconv_cuda::"): [argument.name for argument in schema.arguments]
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("dsconv_cuda::")
    }
    formulas = {name: formula for names, formula in flops._FORMULAS.items() for name in names}
    convolving = {name for name, arguments in schemas.items() if {"x", "pw_weight"} <= set(arguments)}
    assert convolving - set(formulas) == {
        "z_moments",
        "gate_means",
        "norm_block",
    }  # made again, and dissolved into others
    of_modules = {"fwd_packed", "fwd_folded"}  # of the CPU, not of its emulation of the CUDA kernels
    assert set(formulas) - set(schemas) in (set(), of_modules)
    for name, formula in formulas.items():
        if name not in schemas:
            continue
        code = formula.__code__
        assert list(code.co_varnames[: code.co_argcount]) == schemas[name][: code.co_argcount], name


def test_per_module(device):
    net = nn.Sequential(dsconv_cuda.DepthwiseSeparableConv2d(4, 8, 3), nn.ReLU()).to(device)
    with FlopCounterMode(display=False) as counter:
        net(torch.randn(1, 4, 8, 8, device=device))
    assert counter.get_flop_counts()["Sequential.0"] == {torch.ops.dsconv_cuda.fwd: 2 * 36 * (4 * 9 + 4 * 8)}


PREPARE = """
import torch, sys
import dsconv_cuda
net, x = dsconv_cuda.{module}(4, 8, 3), torch.randn(2, 4, 8, 8)
"""
COUNT = "assert counter.get_total_flops() == {}, counter.get_total_flops()\n"
FORWARD = 2 * 2 * 36 * (4 * 9 + 4 * 8)
ORDERS = {
    "a counter before the library": """
from torch.utils.flop_counter import FlopCounterMode
counter = FlopCounterMode(display=False)
with counter:
    net(x)
""",
    "the library before the counter": """
net(x)
assert "torch.utils.flop_counter" not in sys.modules
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    net(x)
""",
    "a counter made before, used after": """
from torch.utils.flop_counter import FlopCounterMode
counter = FlopCounterMode(display=False)
net(x)
with counter:
    net(x)
""",
}


@pytest.mark.parametrize("order", ORDERS)
def test_whatever_is_imported_first(order):
    run_python(PREPARE.format(module="DepthwiseSeparableConv2d") + ORDERS[order] + COUNT.format(FORWARD))


@pytest.mark.parametrize("module", ["DepthwiseSeparableConv2d", "DepthwiseSeparableConvBN2d"])
def test_a_backward_alone(module):
    run_python(
        PREPARE.format(module=module)
        + """
y = net(x).sum()
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    y.backward()
assert counter.get_total_flops() > 0
"""
    )


@pytest.mark.parametrize("training", [False, True])
def test_chains_with_a_gate(training):
    """As many as their modules one by one, where there are kernels for them."""
    depthwise, channels = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), 8

    class SqueezeExcite(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = nn.Conv2d(channels, 3, 1), nn.Conv2d(3, channels, 1)

        def forward(self, x):
            return x * self.fc2(self.fc1(x.mean((2, 3), keepdim=True)).relu()).sigmoid()

    layers = depthwise, nn.BatchNorm2d(8), nn.SiLU(), SqueezeExcite(), nn.Conv2d(8, 5, 1), nn.BatchNorm2d(5)
    model = nn.Sequential(*layers).train(training)
    fused, x = dsconv_cuda.fuse(model), torch.randn(2, 8, 9, 7)
    with torch.no_grad():
        assert _count(lambda: fused(x)) == _count(lambda: model(x)) > 0
    counts = [_count(lambda of=of: of(x.requires_grad_()).sum().backward()) for of in (model, fused)]
    assert counts[0] == counts[1]
