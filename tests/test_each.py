"""The ops of a batch of calls, fwd_each and so on, against the calls one by one: the same bits, and their errors."""

import pytest
import torch
from shapes import Case
from torch.func import functional_call, grad, vmap

import dsconv_cuda
from dsconv_cuda import _loader, depthwise_separable_conv2d, graph_ops, reference, vmap_rules

pytestmark = [pytest.mark.usefixtures("isa")]

SILU, TANH, IDENTITY = 4, 9, 0
GEOMETRY = ((2, 1), (1, 0, 1, 2), (1, 1))
LAYOUTS = {
    "nchw": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "strided": lambda x: x.repeat_interleave(2, -1)[..., ::2],
}


@pytest.fixture(autouse=True)
def _ops(device):
    _loader.load_library()


def batch(layout: str, dtype, device, elements=3, images=2, out_act=TANH):
    """The arguments of fwd_each, of fwd for each element; the input of all in one layout, element 1 twice as large."""
    draw = {"device": device, "dtype": dtype}
    x = torch.stack([LAYOUTS[layout](torch.randn(images, 5, 7, 6, **draw)) for _ in range(elements)])
    if layout != "nchw":  # stack() makes them contiguous
        x = LAYOUTS[layout](x.flatten(0, 1)).unflatten(0, (elements, images))
    weights = [torch.randn(elements, *shape, **draw) for shape in ((10, 1, 3, 2), (4, 10, 1, 1), (10,), (4,))]
    others = (*GEOMETRY, SILU, out_act)
    return (x, *weights), others, [tuple(t[i] for t in (x, *weights)) for i in range(elements)]


def stacked(results: list) -> tuple:
    return tuple(torch.stack(r) for r in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bits_of_the_calls_one_by_one(layout, dtype, device):
    ops = torch.ops.dsconv_cuda
    tensors, others, elements = batch(layout, dtype, device)
    row = graph_ops.row(*others)
    y = ops.fwd_each(*tensors, row)
    assert torch.equal(y, torch.stack([ops.fwd(*element, *others) for element in elements]))
    assert y[0].stride() == ops.fwd(*elements[0], *others).stride()
    pre = ops.fwd_with_pre_each(*tensors, row)[1]
    assert torch.equal(pre, torch.stack([ops.fwd_with_pre(*element, *others)[1] for element in elements]))
    dy = torch.randn_like(y)
    for mask in (31, 1, 4, 2 | 8, 16):
        grads = ops.bwd_each(dy, *tensors[:4], y, row, mask)
        alone = [ops.bwd(g, *e[:4], s, *others, mask) for g, e, s in zip(dy, elements, y, strict=True)]
        for of_all, expected in zip(grads, stacked(alone), strict=True):
            assert torch.equal(of_all, expected)


@pytest.mark.one_isa
def test_what_elements_share_is_expanded(device):
    ops = torch.ops.dsconv_cuda
    tensors, others, _ = batch("channels_last", torch.float32, device)
    shared = (tensors[0], *(t[0].expand_as(t) for t in tensors[1:]))
    expected = torch.stack([ops.fwd(x, *(t[0] for t in tensors[1:]), *others) for x in tensors[0]])
    assert torch.equal(ops.fwd_each(*shared, graph_ops.row(*others)), expected)


@pytest.mark.one_isa
def test_elements_without_images(device):
    ops = torch.ops.dsconv_cuda
    tensors, others, _ = batch("nchw", torch.float32, device, images=0, out_act=IDENTITY)
    row = graph_ops.row(*others)
    y = ops.fwd_each(*tensors, row)
    assert y.shape[:3] == (3, 0, 4)
    grad_x, *of_parameters = ops.bwd_each(torch.zeros_like(y), *tensors[:4], None, row, 31)
    assert grad_x.shape == tensors[0].shape
    assert [g.shape for g in of_parameters] == [t.shape for t in tensors[1:]]
    assert not any(g.any() for g in of_parameters)


@pytest.mark.one_isa
def test_another_number_of_elements_raises(device):
    ops = torch.ops.dsconv_cuda
    (x, dw, pw, dw_bias, pw_bias), others, _ = batch("nchw", torch.float32, device)
    row = graph_ops.row(*others)
    with pytest.raises(RuntimeError, match="fwd_each: every tensor must have 3 elements in front"):
        ops.fwd_each(x, dw, pw[:2], dw_bias, pw_bias, row)
    with pytest.raises(RuntimeError, match="fwd_each: every tensor must have 3 elements in front"):
        ops.fwd_each(x, dw, pw, dw_bias, pw_bias[:1], row)
    with pytest.raises(RuntimeError, match="of one at least"):
        ops.fwd_each(x[:0], dw[:0], pw[:0], None, None, row)
    with pytest.raises(RuntimeError, match="input must have 4 dimensions, got 3"):
        ops.fwd_each(x[0], dw[:2], pw[:2], None, None, row)
    with pytest.raises(RuntimeError, match="arguments takes 11 numbers"):
        ops.fwd_each(x, dw, pw, None, None, row[:-1])


@pytest.mark.one_isa
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_ensembles_of_modules(dims, device):
    """torch.func's way: the parameters of several modules stacked, with their gradients; compiled too."""
    module = getattr(dsconv_cuda, f"DepthwiseSeparableConv{dims}d")
    nets = [module(3, 4, 3, padding=1, bias=True, activation="silu").to(device) for _ in range(3)]
    stacked_parameters, _ = torch.func.stack_module_state(nets)
    x = torch.randn(3, 2, 3, *(9, 7, 5)[:dims], device=device)

    def of_all(parameters, x):
        return vmap(lambda p, x: functional_call(nets[0], p, (x,)))(parameters, x)

    expected = torch.stack([net(x) for net, x in zip(nets, x, strict=True)])
    detached = {name: p.detach() for name, p in stacked_parameters.items()}
    torch.testing.assert_close(of_all(detached, x), expected)
    torch._dynamo.reset()
    compiled = torch.compile(of_all, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(detached, x), expected)
    grads = torch.autograd.grad(of_all(stacked_parameters, x).square().sum(), list(stacked_parameters.values()))
    alone = [
        torch.autograd.grad(y.square().sum(), list(n.parameters()), retain_graph=True)
        for n, y in zip(nets, expected, strict=True)
    ]
    torch.testing.assert_close(grads, stacked(alone))


@pytest.mark.one_isa
def test_the_op_under_vmap_where_gradients_follow(device):
    """register_vmap's rule of the bare op: its elements are calls that have gradients."""
    case = Case(n=2, c=3, c_out=4)
    x, *weights = case.tensors(torch.float64, device)
    several = [torch.stack([w, 2 * w, -w]).requires_grad_() for w in weights]
    others = ([1, 1], [1, 1, 1, 1], [1, 1], SILU, IDENTITY)

    def op(*weights):
        return torch.ops.dsconv_cuda.fwd(x, *weights, *others)

    y = vmap(op)(*several)
    torch.testing.assert_close(y, torch.stack([op(*(w[i] for w in several)) for i in range(3)]))
    alone = torch.stack([op(*(w[i] for w in several)) for i in range(3)])
    torch.testing.assert_close(
        torch.autograd.grad(y.square().sum(), several), torch.autograd.grad(alone.square().sum(), several)
    )


@pytest.fixture
def one_call(monkeypatch):
    def refuse(*_):
        raise AssertionError("element by element")

    monkeypatch.setattr(vmap_rules, "_for_each", refuse)


@pytest.mark.one_isa
@pytest.mark.parametrize("out_activation", ["identity", "tanh", "gelu"])
def test_derivatives_of_a_batch(out_activation, one_call, device):
    """First and second, with what elements share."""
    case = Case(n=2, c=2, multiplier=2, c_out=3, h=4, w=3, activation="silu", out_activation=out_activation)
    x, *weights = case.tensors(torch.float64, device)
    several = [torch.stack([x, -x]), *(torch.stack([w, 1.5 * w]) for w in weights[:2]), *weights[2:]]
    in_dims = (0, 0, 0, None, None)

    def batch_of(op):
        return lambda *tensors: vmap(lambda *t: op(*t, **case.kwargs), in_dims)(*tensors)

    inputs = [t.requires_grad_() for t in several]
    fused, stock = batch_of(depthwise_separable_conv2d), batch_of(reference.depthwise_separable_conv2d)
    torch.testing.assert_close(fused(*inputs), stock(*inputs))
    assert torch.autograd.gradcheck(fused, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(fused, inputs, fast_mode=True)


@pytest.mark.one_isa
@pytest.mark.parametrize("out_activation", ["identity", "tanh", "gelu"])
def test_gradients_of_samples_that_have_gradients(out_activation, one_call, device):
    """vmap(grad) of parameters that require gradients, as those of a module do."""
    case = Case(n=1, c=2, c_out=3, h=4, w=3, activation="silu", out_activation=out_activation)
    x, *weights = [t.requires_grad_() for t in case.tensors(torch.float64, device)]
    samples = torch.randn(3, *x.shape, device=device, dtype=x.dtype, requires_grad=True)

    def of_samples(op):
        of_one = grad(lambda w, x: op(x, *w, **case.kwargs).square().sum())
        grads = vmap(of_one, (None, 0))(weights, samples)
        return grads, torch.autograd.grad(sum(g.square().sum() for g in grads), [*weights, samples])

    torch.testing.assert_close(of_samples(depthwise_separable_conv2d), of_samples(reference.depthwise_separable_conv2d))
