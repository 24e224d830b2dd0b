"""torch.compile and torch.export: one graph, the bare op in it, right in both directions."""

import pytest
import torch
from shapes import Case

import dsconv_cuda
from dsconv_cuda import DepthwiseSeparableConv2d, depthwise_separable_conv2d, reference

pytestmark = [pytest.mark.usefixtures("isa"), pytest.mark.one_isa]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _assert_trains_alike(compiled, tensors: list, kwargs: dict):
    y = compiled(*tensors, **kwargs)
    expected = depthwise_separable_conv2d(*tensors, **kwargs)
    torch.testing.assert_close(y, expected)
    assert y.stride() == expected.stride()
    dy = torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, tensors, dy), torch.autograd.grad(expected, tensors, dy))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("out_activation", ["identity", "tanh", "silu"])
def test_forward_and_backward_in_one_graph(out_activation, channels_last, device):
    case = Case(activation="relu6", out_activation=out_activation)
    compiled = torch.compile(depthwise_separable_conv2d, fullgraph=True, backend="aot_eager")
    _assert_trains_alike(compiled, case.tensors(torch.float32, device, channels_last, requires_grad=True), case.kwargs)


def test_no_gradient(device):
    case = Case(out_activation="silu")
    compiled = torch.compile(depthwise_separable_conv2d, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        tensors = case.tensors(torch.float32, device)
        torch.testing.assert_close(
            compiled(*tensors, **case.kwargs), depthwise_separable_conv2d(*tensors, **case.kwargs)
        )


@pytest.mark.parametrize("padding", [0, (1, 2), "same", "valid"])
def test_arguments_as_users_give_them(padding, device):
    case = Case(kernel=(3, 4))
    compiled = torch.compile(depthwise_separable_conv2d, fullgraph=True, backend="aot_eager")
    tensors = case.tensors(torch.float32, device, requires_grad=True)
    _assert_trains_alike(compiled, tensors, {"padding": padding, "activation": torch.nn.SiLU(), "out_activation": None})


def test_one_graph_serves_several_sizes(device):
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(depthwise_separable_conv2d, fullgraph=True, backend="aot_eager", dynamic=True)
    for n, h, w in ((2, 9, 11), (3, 12, 7), (5, 30, 30)):
        case = Case(n=n, h=h, w=w, stride=(2, 2))
        _assert_trains_alike(compiled, case.tensors(torch.float32, device, requires_grad=True), case.kwargs)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_the_module_becomes_dynamic_after_its_first_size(device):
    """Without dynamic=True: the second size compiles anew, with every size free, and no other does."""
    torch._dynamo.utils.counters.clear()
    net = DepthwiseSeparableConv2d(4, 8, 3, 2, 1, bias=True, activation="relu", out_activation="silu").to(device)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    for n, h, w in ((2, 9, 11), (3, 12, 7), (5, 30, 30), (4, 31, 8), (7, 6, 40)):
        x = torch.randn(n, 4, h, w, device=device, requires_grad=True)
        torch.testing.assert_close(
            torch.autograd.grad(compiled(x).sum(), [x, *net.parameters()]),
            torch.autograd.grad(net(x).sum(), [x, *net.parameters()]),
        )
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_inductor_and_the_module(device):
    net = torch.nn.Sequential(
        DepthwiseSeparableConv2d(4, 8, 3, padding=1, bias=True, activation="relu", out_activation="hardswish"),
        torch.nn.BatchNorm2d(8),
        DepthwiseSeparableConv2d(8, 6, 3, 2, 1, bias=True, activation="silu"),
    ).to(device)
    x = torch.randn(2, 4, 9, 9, device=device)
    expected = torch.autograd.grad(net(x).square().sum(), list(net.parameters()))
    compiled = torch.compile(net, fullgraph=True)
    actual = torch.autograd.grad(compiled(x).square().sum(), list(net.parameters()))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_autocast_inside_and_around_the_graph(device):
    case = Case()
    tensors = case.tensors(torch.float32, device, requires_grad=True)

    def inside(*tensors):
        with torch.autocast(device.type, torch.bfloat16):
            return depthwise_separable_conv2d(*tensors, **case.kwargs)

    y = torch.compile(inside, fullgraph=True, backend="aot_eager")(*tensors)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, inside(*tensors))
    with torch.autocast(device.type, torch.bfloat16):
        around = torch.compile(depthwise_separable_conv2d, fullgraph=True, backend="aot_eager")(*tensors, **case.kwargs)
    assert torch.equal(around, y)


def test_second_derivative_of_a_compiled_graph_raises(device):
    tensors = Case().tensors(torch.float64, device, requires_grad=True)
    y = torch.compile(depthwise_separable_conv2d, backend="aot_eager")(*tensors)

    def second():
        (grad_x,) = torch.autograd.grad(y.square().sum(), tensors[0], create_graph=True)
        return torch.autograd.grad(grad_x.sum(), tensors[1])

    with pytest.raises(RuntimeError):
        second()


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict, device):
    net = dsconv_cuda.models.ExampleNet().to(device).eval()
    x = torch.randn(2, 3, 8, 8, device=device)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(net, (x,), dynamic_shapes={"x": {0: batch}}, strict=strict)
    assert sum("dsconv_cuda.fwd" in str(node.target) for node in program.graph.nodes) == 1
    larger = torch.randn(5, 3, 8, 8, device=device)
    torch.testing.assert_close(program.module()(larger), net(larger))


def test_make_fx_traces_the_op(device):
    from torch.fx.experimental.proxy_tensor import make_fx

    tensors = Case().tensors(torch.float32, device)
    graph = make_fx(lambda *t: depthwise_separable_conv2d(*t), tracing_mode="fake")(*tensors)
    assert any("dsconv_cuda.fwd" in str(node.target) for node in graph.graph.nodes)
    torch.testing.assert_close(graph(*tensors), reference.depthwise_separable_conv2d(*tensors))
