"""The gradients against the oracle, which of them are computed, and what is kept for them."""

import functools
import itertools
import types

import pytest
import torch
from oracle import check, check_case
from shapes import ALL, LAYERS, WINDOWS, Case, identify, with_dtype

from dsconv_cuda import autograd, depthwise_separable_conv2d, ops
from dsconv_cuda.activations import ACTIVATIONS

numerical = pytest.mark.usefixtures("isa")


@numerical
@pytest.mark.parametrize(("case", "dtype", "channels_last"), with_dtype(ALL), ids=identify)
def test_shapes_around_tile_edges(case, dtype, channels_last, device):
    check_case(case, dtype, device, channels_last, backward=True)


@numerical
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("case", [*LAYERS, *WINDOWS], ids=identify)
def test_layers(case, channels_last, device):
    check_case(case, torch.float32, device, channels_last, backward=True)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("c", [40, 48])
def test_tensors_that_no_cache_holds(c, stride, isa, device):
    """More than kSharedCacheBytes: AVX-512 writes grad_x past the caches where its rows are aligned (48), by panels of
    32 channels and of what is left of them, in pairs of rows and behind the last whole group of columns."""
    if isa == "emulated":
        pytest.skip("what is large for the CPU's sake")
    case = Case(n=2, c=c, c_out=8, h=187, w=186, stride=(stride, stride))
    check_case(case, torch.float32, device, channels_last=True, backward=True)


@numerical
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=identify)
def test_activations_at_their_kinks(dtype, device):
    kinks = torch.tensor([-7.0, -6.0, -3.0, -0.0, 0.0, 3.0, 6.0, 7.0], device=device, dtype=dtype)
    one = torch.ones(1, 1, 1, 1, device=device, dtype=dtype)
    for name in ("relu", "relu6", "leaky_relu", "hardswish", "hardsigmoid"):
        for kwargs in ({"activation": name}, {"out_activation": name}):
            check([kinks.view(1, 1, 1, -1), one, one, None, None], kwargs, backward=True)


@numerical
@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("out_activation", ["identity", "tanh", "silu"])
def test_only_what_is_asked_for_is_computed(out_activation, plain, device, monkeypatch):
    """Every combination of needs_input_grad gives the bits that all of them together give, and nothing else runs."""
    case = Case(activation="silu", out_activation=out_activation)
    tensors = case.tensors(torch.float32, device)
    masks = []

    def spy(bwd):
        def spied(*args):
            masks.append(args[-1])
            grads = bwd(*args)
            assert [g.numel() > 0 for g in grads] == [bool(args[-1] & bit) for bit in ops.GRAD_BITS]
            return grads

        return spied

    depthwise_separable_conv2d(*tensors, **case.kwargs)  # has the ops registered
    monkeypatch.setattr(torch.ops.dsconv_cuda, "bwd", spy(torch.ops.dsconv_cuda.bwd))
    kept_arguments = functools.cache(autograd.kept_arguments.__wrapped__)
    monkeypatch.setattr(autograd, "kept_arguments", kept_arguments)
    if not plain:
        monkeypatch.setattr(autograd, "_is_plain", lambda tensors: False)
    elif autograd.kept_kernels():
        kept_bwd = spy(torch.ops.dsconv_cuda.bwd_kept)
        monkeypatch.setattr(torch.ops.dsconv_cuda, "bwd_kept", types.SimpleNamespace(default=kept_bwd))

    def grads_of(needed):
        leaves = [t.clone().requires_grad_(n) for t, n in zip(tensors, needed, strict=True)]
        depthwise_separable_conv2d(*leaves, **case.kwargs).backward(dy)
        return [t.grad for t in leaves]

    dy = torch.randn_like(depthwise_separable_conv2d(*tensors, **case.kwargs))
    every = grads_of((True,) * 5)
    for needed in itertools.product((False, True), repeat=5):
        if not any(needed):
            continue
        masks.clear()
        for grad, expected, wanted in zip(grads_of(needed), every, needed, strict=True):
            assert (grad is not None) == wanted
            assert grad is None or torch.equal(grad, expected)
        assert masks == [ops.grad_mask(*needed)]


@numerical
def test_no_graph_without_a_gradient_to_compute(device):
    tensors = Case().tensors(torch.float32, device, requires_grad=True)
    with torch.no_grad():
        assert depthwise_separable_conv2d(*tensors).grad_fn is None
    with torch.inference_mode():
        assert depthwise_separable_conv2d(*tensors).is_inference()
    assert depthwise_separable_conv2d(*(t.detach() for t in tensors)).grad_fn is None


@numerical
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=identify)
@pytest.mark.parametrize("activation", ["identity", "silu", "hardswish"])
@pytest.mark.parametrize("out_activation", list(ACTIVATIONS))
def test_bytes_saved_for_backward(activation, out_activation, dtype, device):
    """The input, the weights and the biases; one tensor of the output's size more with an out_activation."""
    case = Case(n=2, c=8, multiplier=2, c_out=24, h=12, w=12, activation=activation, out_activation=out_activation)
    tensors = case.tensors(dtype, device, requires_grad=True)
    saved = {}

    def pack(t):
        saved[t.data_ptr()] = t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = depthwise_separable_conv2d(*tensors, **case.kwargs)
    expected = sum(t.numel() for t in tensors)
    if out_activation != "identity":
        expected += y.numel()
    assert sum(saved.values()) == expected * y.element_size()


@numerical
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("out_activation", ["identity", "relu", "gelu"])
def test_inputs_are_not_modified(channels_last, out_activation, device):
    case = Case(out_activation=out_activation)
    tensors = case.tensors(torch.float32, device, channels_last, requires_grad=True)
    before = [t.detach().clone() for t in tensors]
    versions = [t._version for t in tensors]
    y = depthwise_separable_conv2d(*tensors, **case.kwargs)
    dy = torch.randn_like(y)
    dy_before, y_before = dy.clone(), y.detach().clone()
    y.backward(dy)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    assert [t._version for t in tensors] == versions
    assert torch.equal(dy, dy_before)
    assert torch.equal(y, y_before)


@numerical
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=identify)
def test_gradients_that_are_not_dense(dtype, device):
    """dy as autograd makes it: expanded from a sum, transposed, sliced, in the other memory format."""
    case = Case(c_out=6, h=9, w=9)
    tensors = case.tensors(dtype, device, requires_grad=True)
    y = depthwise_separable_conv2d(*tensors, **case.kwargs)
    made = {
        "expanded": torch.randn(1, 1, 1, 1).to(device, dtype).expand_as(y),
        "expanded image": torch.randn_like(y[:1]).expand_as(y),
        "expanded channel": torch.randn_like(y[:, :1]).expand_as(y),
        "transposed": torch.randn_like(y).transpose(2, 3),
        "sliced": torch.randn(*y.shape[:3], 2 * y.shape[3]).to(device, dtype)[..., ::2],
        "channel slice": torch.randn(y.shape[0], 3 * y.shape[1], *y.shape[2:]).to(device, dtype)[:, 4 : 4 + y.shape[1]],
        "channels_last": torch.randn_like(y, memory_format=torch.channels_last),
    }
    for name, dy in made.items():
        grads = torch.autograd.grad(y, tensors, dy, retain_graph=True)
        dense = torch.autograd.grad(y, tensors, dy.clone(memory_format=torch.contiguous_format), retain_graph=True)
        for grad, expected in zip(grads, dense, strict=True):
            torch.testing.assert_close(grad, expected, msg=lambda text, name=name: f"{name}: {text}")


@numerical
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=identify)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("c", [3, 17, 37, 113])
def test_both_depthwise_gradients_of_3x3_around_the_edges_of_boxes(c, stride, dtype, device):
    """Channels together: boxes of 128 cells in patches of 2 x 4, several to a block, and what is left of them; pixels
    that no window reaches, and windows that reach no pixel."""
    for n, h, w, padding, dw_bias in (
        (7, 7, 7, (1, 1), True),
        (1, 17, 33, (1, 1), True),
        (2, 13, 18, (0, 2), True),
        (1, 6, 35, (2, 0), True),
        (3, 8, 9, (4, 3), False),
        (2, 5, 4, (1, 5), True),
    ):
        case = Case(n=n, c=c, c_out=3, h=h, w=w, stride=(stride, stride), padding=padding, dw_bias=dw_bias)
        check_case(case, dtype, device, channels_last=True, backward=True)
        x, *weights = case.tensors(dtype, device)
        room = torch.randn(n, c + c % 2 + 2, h, w).to(x).contiguous(memory_format=torch.channels_last)
        check([room[:, :c], *weights], case.kwargs, backward=True)


@numerical
@pytest.mark.parametrize("with_grad_x", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=identify)
@pytest.mark.parametrize(
    "case",
    [
        Case(c=4, c_out=3, h=9, w=10, activation="identity", **geometry)
        for geometry in (
            {},
            {"stride": (2, 2)},
            {"kernel": (5, 5), "padding": (2, 2)},
            {"kernel": (5, 5), "padding": (2, 2), "stride": (2, 2)},
            {"kernel": (7, 7), "padding": (3, 3)},
            {"kernel": (2, 3), "padding": (1, 2), "stride": (1, 2)},
            {"padding": (2, 3), "dilation": (2, 3)},
        )
    ],
    ids=identify,
)
def test_an_infinite_input_reaches_the_taps_that_meet_it_and_no_other(case, dtype, channels_last, with_grad_x, device):
    """What a kernel pads with zeros, of du and of its own tiles, has no product with an infinite x."""
    for row, column in ((0, 0), (0, -1), (-1, 0), (-1, -1), (4, -2)):
        x, *weights = case.tensors(dtype, device, channels_last)
        x[1, 2, row, column] = torch.inf
        results = []
        for of in (dtype, torch.float64):
            dw_weight = weights[0].to(of).requires_grad_()
            arguments = [x.to(of).detach().requires_grad_(with_grad_x), dw_weight, *(t.to(of) for t in weights[1:])]
            if of == dtype:
                y = depthwise_separable_conv2d(*arguments, **case.kwargs)
                dy = torch.randn_like(y)
            else:
                geometry = (case.stride, case.padding, case.dilation)
                z = torch.nn.functional.conv2d(*(t.cpu() for t in arguments[:2]), arguments[3].cpu(), *geometry, case.c)
                y = torch.nn.functional.conv2d(z, arguments[2].cpu(), arguments[4].cpu())
            grad, *_ = torch.autograd.grad(y, [dw_weight, arguments[0]][: 1 + with_grad_x], dy.to(y))
            results.append(grad.cpu().double())
        grad, expected = results
        assert torch.equal(grad.isfinite(), expected.isfinite()), (row, column)
        assert not grad[expected.isinf()].isnan().any(), (row, column)


@numerical
def test_gradients_accumulate_in_shared_and_repeated_use(device):
    """One weight in two calls, and .grad accumulating over two backward passes."""
    tensors = Case(c=7, c_out=7).tensors(torch.float64, device, requires_grad=True)
    x, *weights = tensors
    y = depthwise_separable_conv2d(depthwise_separable_conv2d(x, *weights, padding=1), *weights, padding=1)
    y.sum().backward(retain_graph=True)
    once = [t.grad.clone() for t in tensors]
    y.sum().backward()
    assert all(torch.allclose(t.grad, 2 * g) for t, g in zip(tensors, once, strict=True))


def test_backward_after_an_in_place_change_raises():
    x, *weights = Case().tensors(torch.float32, requires_grad=True)
    y = depthwise_separable_conv2d(x, *weights)
    with torch.no_grad():
        weights[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@numerical
def test_non_reentrant_checkpoint(device):
    from torch.utils.checkpoint import checkpoint

    case = Case(out_activation="silu")
    tensors = case.tensors(torch.float32, device, requires_grad=True)

    def run():
        return depthwise_separable_conv2d(*tensors, **case.kwargs)

    expected = torch.autograd.grad(run().square().sum(), tensors)
    actual = torch.autograd.grad(checkpoint(run, use_reentrant=False).square().sum(), tensors)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@numerical
@pytest.mark.parametrize("c_out", [1, 2])
def test_the_pointwise_bias_gradient_of_few_channels(device, c_out):
    """dy sums to much less than what is summed: plain sums were beyond the budget in one of 25 such cases."""
    for seed in range(20):
        torch.manual_seed(seed)
        check_case(Case(c_out=c_out), torch.float32, device, channels_last=False, backward=True)


@numerical
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("width", [13, 55, 56])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_pixels_beyond_the_edge_count_for_nothing(dtype, width, channels_last, device):
    """Behind the last column of the output z would overflow: tiles that reach beyond it must not multiply by that."""
    x = torch.randn(1, 4, 8, width)
    x[..., -1] = 0.9 * torch.finfo(dtype).max
    dw_weight = torch.randn(4, 1, 3, 3)
    # Of the taps that read the last column of x one alone is not zero, the next pixel's.
    dw_weight[..., 0], dw_weight[..., 1:] = 4, 0
    pw_weight, dy = torch.randn(8, 4, 1, 1), 1e-3 * torch.randn(1, 8, 8, width)
    tensors = [t.to(device, dtype) for t in (x, dw_weight, pw_weight, dy)]
    if channels_last:
        tensors[0] = tensors[0].contiguous(memory_format=torch.channels_last)
    *operands, dy = tensors
    operands[2].requires_grad_()
    y = depthwise_separable_conv2d(*operands, padding=1, activation="relu")
    (grad,) = torch.autograd.grad(y, operands[2], dy)
    a = torch.nn.functional.conv2d(operands[0].double(), operands[1].double(), padding=1, groups=4).relu()
    expected = torch.einsum("nohw,nchw->oc", dy.double(), a).view(8, 4, 1, 1)
    torch.testing.assert_close(grad.double(), expected, rtol=1e-2, atol=1e-2 * expected.abs().max().item())
