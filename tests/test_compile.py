"""torch.compile and torch.export: one graph, the bare op in it, right in both directions."""

import copy
import gc
import weakref

import pytest
import torch
from functorch.compile import make_boxed_func
from shapes import Case
from torch._dynamo.backends.common import aot_autograd

import dsconv_cuda
from dsconv_cuda import (
    DepthwiseSeparableConv2d,
    DepthwiseSeparableConvBN2d,
    _loader,
    compiled_weights,
    depthwise_separable_conv2d,
    graph_ops,
    reference,
)

pytestmark = [pytest.mark.usefixtures("isa"), pytest.mark.one_isa]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _ops_of(graph: torch.fx.Graph) -> list[str]:
    """The package's ops in it."""
    targets = (str(node.target).split(".") for node in graph.nodes)
    return [name for package, name, *_ in (t for t in targets if len(t) > 1) if package == "dsconv_cuda"]


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


@pytest.mark.parametrize(
    ("out_activation", "forward"), [("identity", "fwd_in_graph"), ("silu", "fwd_with_pre_in_graph")]
)
def test_graphs_hold_ops_without_gradients(out_activation, forward, device):
    tensors = Case().tensors(torch.float32, device, requires_grad=True)
    backend = _Backend()
    compiled = torch.compile(depthwise_separable_conv2d, fullgraph=True, backend=backend)
    compiled(*tensors, out_activation=out_activation).sum().backward()
    assert backend.ops == [forward, "bwd_in_graph"]


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
    assert _ops_of(program.graph) == ["fwd"]
    larger = torch.randn(5, 3, 8, 8, device=device)
    torch.testing.assert_close(program.module()(larger), net(larger))


def test_make_fx_traces_the_op(device):
    from torch.fx.experimental.proxy_tensor import make_fx

    tensors = Case().tensors(torch.float32, device)
    graph = make_fx(lambda *t: depthwise_separable_conv2d(*t), tracing_mode="fake")(*tensors)
    assert _ops_of(graph.graph) == ["fwd"]
    torch.testing.assert_close(graph(*tensors), reference.depthwise_separable_conv2d(*tensors))


# ---- the block with BatchNorm: batchnorm_graph.py --------------------------------------------------------------------


def _frozen(block: DepthwiseSeparableConvBN2d, norm: str) -> DepthwiseSeparableConvBN2d:
    getattr(block, norm).eval()
    return block


_BLOCKS = {
    "block": lambda: DepthwiseSeparableConvBN2d(6, 10, 3, padding=1, bias=True, out_activation="silu"),
    "recompute": lambda: DepthwiseSeparableConvBN2d(6, 10, 3, padding=1, recompute_output=True),
    "first norm frozen": lambda: _frozen(DepthwiseSeparableConvBN2d(6, 10, 3, padding=1), "bn1"),
    "second norm frozen": lambda: _frozen(DepthwiseSeparableConvBN2d(6, 10, 3, padding=1), "bn2"),
    "chain": lambda: dsconv_cuda.DepthwiseSeparableSequence(
        DepthwiseSeparableConvBN2d(6, 10, 3, padding=1),
        DepthwiseSeparableConvBN2d(10, 10, 3, 2, padding=1, out_activation="relu6"),
        DepthwiseSeparableConvBN2d(10, 7, 3, padding=1),
    ),
}


def _kept_for_backward(net, x) -> tuple[torch.Tensor, int]:
    """The output, and the bytes of the storages saved beside parameters."""
    seen = {}

    def pack(t):
        seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = net(x)
    return y, sum(n for p, n in seen.items() if p not in {p.untyped_storage().data_ptr() for p in net.parameters()})


@pytest.mark.parametrize(
    ("name", "backend"), [*((name, "aot_eager") for name in _BLOCKS), ("block", "inductor"), ("chain", "inductor")]
)
def test_training_through_batch_norm_in_one_graph(name, backend, device):
    """Fullgraph, and from its second size on one graph for all; outputs, gradients and running statistics are those of
    eager mode, and no more is kept for backward."""
    torch._dynamo.utils.counters.clear()
    net = _BLOCKS[name]().to(device)
    _loader.load_library()
    if not _loader.batch_norm_kernels_loaded(device.type):
        pytest.skip("no kernels for a norm that trains")
    other = copy.deepcopy(net)
    compiled = torch.compile(net, fullgraph=True, backend=backend)
    for n, h, w in ((2, 9, 11), (3, 12, 7), (5, 14, 14)):
        x = torch.randn(n, 6, h, w, device=device, requires_grad=True)
        (y, kept), (expected, kept_in_eager_mode) = _kept_for_backward(compiled, x), _kept_for_backward(other, x)
        torch.testing.assert_close(y, expected)
        assert kept <= kept_in_eager_mode
        dy = torch.randn_like(y)
        torch.testing.assert_close(
            torch.autograd.grad(y, [x, *net.parameters()], dy),
            torch.autograd.grad(expected, [x, *other.parameters()], dy),
        )
        for (key, buffer), wanted in zip(net.named_buffers(), other.buffers(), strict=True):
            torch.testing.assert_close(buffer, wanted, msg=key)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("what", ["block", "fused model"])
def test_graphs_of_training_hold_the_fused_kernels(what, device):
    if what == "block":
        net = DepthwiseSeparableConvBN2d(6, 10, 3, padding=1)
    else:
        parts = torch.nn.Conv2d(6, 6, 3, padding=1, groups=6), torch.nn.BatchNorm2d(6), torch.nn.ReLU()
        net = torch.nn.Sequential(*parts, torch.nn.Conv2d(6, 10, 1), torch.nn.BatchNorm2d(10), torch.nn.ReLU())
        net = dsconv_cuda.fuse(net)
    _loader.load_library()
    if not _loader.batch_norm_kernels_loaded(device.type):
        pytest.skip("no kernels for a norm that trains")
    backend = _Backend()
    x = torch.randn(2, 6, 9, 7, device=device)
    torch.compile(net.to(device), fullgraph=True, backend=backend)(x).sum().backward()
    if _loader.has_kernel("train_fwd_in_graph", device.type.upper()):
        assert backend.ops == ["train_fwd_in_graph", "train_bwd_in_graph"]
    else:
        forward = ["z_moments", "norm_vectors", "fwd_norm", "norm_vectors", "norm_act"]
        assert backend.ops == [*forward, "norm_act_sums", "bwd_norm"]


def test_the_mean_over_all_batches_in_one_graph(device):
    """momentum=None: how far the statistics move follows the count, which the graph reads."""
    net = DepthwiseSeparableConvBN2d(6, 10, 3, padding=1, momentum=None).to(device)
    other = copy.deepcopy(net)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    for _ in range(4):
        x = torch.randn(2, 6, 9, 7, device=device)
        compiled(x).sum().backward()
        other(x).sum().backward()
    for name, buffer in other.named_buffers():
        torch.testing.assert_close(net.get_buffer(name), buffer, msg=name)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@torch.no_grad()
def test_training_statistics_without_gradients_in_a_graph(device):
    net = DepthwiseSeparableConvBN2d(6, 10, 3, padding=1).to(device)
    x = torch.randn(2, 6, 9, 7, device=device)
    other = copy.deepcopy(net)
    expected = other(x)
    torch.testing.assert_close(torch.compile(net, fullgraph=True, backend="aot_eager")(x), expected)
    for buffer, wanted in zip(net.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(buffer, wanted)


# ---- packed weights in graphs: compiled_weights.py -------------------------------------------------------------------


@pytest.fixture
def packed(device, monkeypatch):
    """A module that is compiled with packed weights."""
    monkeypatch.setattr(compiled_weights, "LEAST_ELEMENTS", 1)
    net = DepthwiseSeparableConv2d(6, 20, 3, padding=1, bias=True, activation="relu", out_activation="silu").to(device)
    _loader.load_library()
    if device.type != "cpu" or not compiled_weights.registered:
        pytest.skip("these kernels keep nothing")
    compiled_weights.clear()
    return net


class _Backend:
    """aot_eager that remembers the ops of its graphs."""

    def __init__(self):
        self.ops = []

    def __call__(self, graph, inputs):
        def remember(graph, inputs):
            self.ops += _ops_of(graph.graph)
            return make_boxed_func(graph.forward)

        return aot_autograd(fw_compiler=remember)(graph, inputs)


@torch.no_grad()
def test_packed_weights_of_a_graph_follow_the_weights(packed):
    backend, x = _Backend(), torch.randn(2, 6, 9, 7)
    compiled = torch.compile(packed, fullgraph=True, backend=backend)

    def check():
        for _ in range(3):
            assert torch.equal(compiled(x), packed._forward(x))
        ((_, ((_, memory),)),) = compiled_weights._kept.values()
        return memory

    memory = check()
    assert backend.ops == ["fwd_packed"]
    packed.pointwise.weight[3, 1] += 1
    packed.depthwise.bias.fill_(0.3)
    assert check() is memory
    packed.pointwise.weight.data *= 2
    check()
    packed.load_state_dict({name: torch.randn_like(t) for name, t in packed.state_dict().items()})
    check()
    packed.pointwise.weight.data = torch.randn_like(packed.pointwise.weight)
    check()
    dsconv_cuda.clear_weight_cache()
    assert check() is not memory


def test_packed_weights_of_a_graph_go_with_the_weights(packed):
    x = torch.randn(2, 6, 9, 7)
    with torch.no_grad():
        torch.compile(packed, backend="aot_eager")(x)
        assert len(compiled_weights._kept) == 1
        memory = weakref.ref(packed.pointwise.weight)
        packed.pointwise.weight = torch.nn.Parameter(torch.randn_like(packed.pointwise.weight))
        torch._dynamo.reset()
        gc.collect()
        assert memory() is None
        assert not compiled_weights._kept


def test_where_graphs_keep_nothing(packed):
    x = torch.randn(2, 6, 9, 7)
    backend = _Backend()
    y = torch.compile(packed, fullgraph=True, backend=backend)(x)
    y.sum().backward()
    assert not any("packed" in name for name in backend.ops)
    with torch.no_grad():
        for strict in (False, True):
            program = torch.export.export(packed.eval(), (x,), strict=strict)
            assert not any("packed" in str(node.target) for node in program.graph.nodes)
    with torch.inference_mode():
        weights = [torch.nn.Parameter(torch.randn_like(p)) for p in packed.parameters()]
        dw, db, pw, pb = weights
        arguments = ([1, 1], [1, 1, 1, 1], [1, 1], 1, 0)
        y = torch.ops.dsconv_cuda.fwd_packed(x, dw, pw, db, pb, graph_ops.row(*arguments))
        assert torch.equal(y, torch.ops.dsconv_cuda.fwd(x, dw, pw, db, pb, *arguments))
    assert not compiled_weights._kept


@torch.no_grad()
def test_the_op_of_packed_weights_under_vmap_and_opcheck(packed):
    x, arguments = torch.randn(3, 2, 6, 9, 7), graph_ops.row([1, 1], [1, 1, 1, 1], [1, 1], 1, 0)
    dw, db, pw, pb = (p.detach() for p in packed.parameters())
    op = torch.ops.dsconv_cuda.fwd_packed
    batched = torch.func.vmap(lambda x: op(x, dw, pw, db, pb, arguments))(x)
    assert torch.equal(batched[1], op(x[1], dw, pw, db, pb, arguments))
    torch.library.opcheck(op.default, (x[0], dw, pw, db, pb, arguments))
