"""The block as a module: what it shares with stock modules, what it keeps for backward, and what it refuses."""

import copy
import pickle
import warnings
from functools import partial

import pytest
import torch
from test_batchnorm_block import Shape
from torch import nn
from torch.nn.utils import prune

import dsconv_cuda
from bench.accuracy import Plain, results
from bench.saved import saved_bytes
from dsconv_cuda import (
    BatchNormArguments,
    DepthwiseSeparableConvBN2d,
    DepthwiseSeparableSequence,
    depthwise_separable_conv_bn2d,
)

pytestmark = [pytest.mark.usefixtures("isa"), pytest.mark.one_isa]


def test_state_dict_goes_both_ways():
    block = Shape().block()
    plain = Plain(Shape().block())
    assert list(block.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(block.state_dict())
    block.load_state_dict(plain.state_dict())
    names = [name for name, _ in block.named_children()]
    assert names == ["depthwise", "bn1", "pointwise", "bn2"]


def test_arguments_of_the_interface():
    block = DepthwiseSeparableConvBN2d(4, 8, 3, 2, 1, eps=1e-3, momentum=None)
    assert (block.activation, block.out_activation) == ("relu", "relu")
    assert block.depthwise.bias is None
    assert (block.bn1.eps, block.bn1.momentum, block.bn2.num_features) == (1e-3, None, 8)
    assert "activation=relu, out_activation=relu" in repr(block)
    assert "recompute_output=True" in repr(DepthwiseSeparableConvBN2d(4, 8, 3, recompute_output=True))
    with pytest.raises(ValueError, match="channel_multiplier"):
        DepthwiseSeparableConvBN2d(4, 8, 3, channel_multiplier=0)
    with pytest.raises(ValueError, match="out_activation"):
        DepthwiseSeparableConvBN2d(4, 8, 3, out_activation="swoosh")


@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
def test_running_statistics_over_several_batches(momentum, device):
    block = Shape(bias=True).block().to(device)
    block.bn1.momentum = block.bn2.momentum = momentum
    plain = Plain(block)
    for _ in range(3):
        x = Shape().input().to(device)
        torch.testing.assert_close(block(x), plain(x), rtol=1e-4, atol=1e-4)
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(block.get_buffer(name), buffer, rtol=1e-4, atol=1e-5)
    assert block.bn1.num_batches_tracked == 3
    block.eval()
    plain.eval()
    torch.testing.assert_close(block(x), plain(x), rtol=1e-4, atol=1e-4)
    assert block.bn1.num_batches_tracked == 3


def test_statistics_that_are_not_tracked_stay(device):
    block = Shape().block().to(device)
    block.bn1 = nn.BatchNorm2d(13, track_running_stats=False).to(device)
    for training in (True, False):
        block.train(training)
        plain = Plain(block)
        x = Shape().input().to(device)
        torch.testing.assert_close(block(x), plain(x), rtol=1e-4, atol=1e-4)
        assert block.bn1.running_mean is None


def test_one_value_per_channel_raises_as_pytorch_does(device):
    block = DepthwiseSeparableConvBN2d(3, 4, 3).to(device)
    x = torch.randn(1, 3, 3, 3, device=device)
    texts = []
    for change in (lambda m: None, lambda m: m.bn1.eval()):
        change(block)
        with pytest.raises(ValueError, match="Expected more than 1 value per channel") as expected:
            Plain(block)(x)
        with pytest.raises(ValueError, match="Expected more than 1 value per channel") as actual:
            block(x)
        assert str(actual.value) == str(expected.value)
        texts.append(str(actual.value))
    assert texts[0] != texts[1]  # that of bn1 and that of bn2
    assert block.eval()(x).shape == (1, 4, 1, 1)


def test_frozen_norms_train_what_is_left(device):
    """.eval() on the norms of a training model: their affine pairs still get gradients, their statistics stay."""
    block = Shape().block().to(device)
    block.bn1.eval()
    block.bn2.eval()
    before = block.bn1.running_mean.clone()
    block(Shape().input().to(device)).square().mean().backward()
    assert all(p.grad is not None for p in block.parameters())
    assert torch.equal(block.bn1.running_mean, before)


def test_only_what_requires_a_gradient_gets_one(device):
    block = Shape(out_activation="silu").block().to(device)
    x = Shape().input().to(device)
    dy = torch.randn_like(copy.deepcopy(block)(x))
    every = results(block, x, dy)
    for name, wanted in block.named_parameters():
        for p in block.parameters():
            p.requires_grad_(p is wanted)
        (grad,) = torch.autograd.grad(block(x), [wanted], dy)
        torch.testing.assert_close(grad, every[f"grad {name}"])
    for p in block.parameters():
        p.requires_grad_(False)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(block(x), [x], dy)
    torch.testing.assert_close(grad, every["grad x"])
    assert not block(x.detach()).requires_grad


def test_norms_of_other_kinds_are_refused(device):
    class Own(nn.BatchNorm2d):
        def forward(self, x):
            return x

    class Same(nn.BatchNorm2d):
        pass

    block, x = Shape().block().to(device), Shape().input().to(device)
    block.bn1 = Same(13).to(device)
    block(x)
    namesake = type("BatchNorm2d", (Own,), {"__module__": "elsewhere"})
    for norm in (Own(13), nn.GroupNorm(1, 13), nn.InstanceNorm2d(13), namesake(13)):
        block.bn1 = norm.to(device)
        with pytest.raises(TypeError, match="bn1 must be an nn") as error:
            block(x)
        assert f"got {type(norm).__module__}.{type(norm).__qualname__};" in str(error.value)


def test_hooks_on_children_see_what_pytorch_shows_them(device):
    block, x = Shape().block().to(device), Shape().input().to(device)
    expected = copy.deepcopy(block)(x)
    chain = DepthwiseSeparableSequence(Shape(c_out=13).block(), block, Shape(c=17).block()).to(device)
    alone = nn.Sequential(*copy.deepcopy(chain))(x)
    seen = {}
    for name, child in block.named_children():
        child.register_forward_hook(lambda module, args, out, name=name: seen.update({name: out.shape[1]}))
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-4)
    assert seen == {"depthwise": 13, "bn1": 13, "pointwise": 17, "bn2": 17}
    seen.clear()
    torch.testing.assert_close(chain(x), alone, rtol=1e-4, atol=1e-3)
    assert len(seen) == 4
    assert block.bn1.num_batches_tracked == 2


@pytest.mark.parametrize("of", [lambda conv: prune.l1_unstructured(conv, "weight", 0.4), nn.utils.spectral_norm])
def test_hooks_that_compute_a_weight(of, device):
    """They run before each call, and the block stays one: stock modules agree over two steps of an optimiser."""
    block, x = Shape().block().to(device), Shape().input().to(device)
    plain = Plain(block)
    for module in (block, plain):
        torch.manual_seed(1)
        of(module.depthwise)
        of(module.pointwise)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
        for _ in range(2):
            optimizer.zero_grad()
            module(x).square().mean().backward()
            optimizer.step()
    for (name, p), q in zip(block.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_padding_mode_of_the_depthwise_child(device):
    block, x = Shape().block().to(device), Shape().input().to(device)
    block.depthwise.padding_mode = "reflect"
    plain = Plain(block)
    torch.testing.assert_close(block(x), plain(x), rtol=1e-4, atol=1e-4)
    chain = DepthwiseSeparableSequence(Shape(c_out=13).block(), block).to(device)
    alone = nn.Sequential(*copy.deepcopy(chain))
    torch.testing.assert_close(chain(x), alone(x), rtol=1e-4, atol=1e-3)


def test_arguments_that_do_not_fit(device):
    x, dw, pw = (torch.randn(*s, device=device) for s in ((2, 3, 5, 5), (3, 1, 3, 3), (4, 3)))
    norm = BatchNormArguments(training=True)
    with pytest.raises(ValueError, match=r"input must have shape \[N, C, H, W\]"):
        depthwise_separable_conv_bn2d(x[0], dw, pw, bn1=norm)
    with pytest.raises(TypeError, match="bn2 must be a BatchNormArguments or None"):
        depthwise_separable_conv_bn2d(x, dw, pw, bn2=nn.BatchNorm2d(4))
    with pytest.raises(ValueError, match=r"bn1\.weight must have shape \[3\]"):
        depthwise_separable_conv_bn2d(x, dw, pw, bn1=BatchNormArguments(weight=torch.ones(4, device=device)))
    bias = torch.ones(3, device=device, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"bn1\.bias must have the dtype"):
        depthwise_separable_conv_bn2d(x, dw, pw, bn1=BatchNormArguments(bias=bias))
    with pytest.raises(ValueError, match="bn2 needs running_mean and running_var"):
        depthwise_separable_conv_bn2d(x, dw, pw, bn2=BatchNormArguments())
    with pytest.raises(ValueError, match="eps must be positive"):
        depthwise_separable_conv_bn2d(x, dw, pw, bn1=BatchNormArguments(training=True, eps=0.0))


def test_copies_and_pickles(device):
    block = Shape(activation="silu").block()
    x = Shape().input()
    dy = torch.randn_like(copy.deepcopy(block)(x))
    expected = results(block, x, dy)
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert all(torch.equal(value, expected[name]) for name, value in results(other, x, dy).items())


def test_autocast(device):
    """Convolutions in bfloat16, norms' parameters and running statistics in float32, as with stock modules."""
    block = Shape(n=4, h=16, w=16).block().to(device)
    plain = Plain(block)
    x = Shape(n=4, h=16, w=16).input().to(device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out, expected = block(x), plain(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected.float(), rtol=0.05, atol=0.05)
    out.float().square().mean().backward()
    expected.float().square().mean().backward()
    for p, q in zip(block.parameters(), plain.parameters(), strict=True):
        assert p.grad.dtype == torch.float32
        torch.testing.assert_close(p.grad, q.grad, rtol=0.1, atol=0.05)
    assert block.bn1.running_mean.dtype == torch.float32


def _block_and_function(norms):
    """The module and the function form of the same block, of an input and a weight."""
    block = Shape(c=3, c_out=4, activation="silu", out_activation="silu").block(dtype=torch.float64)
    norms(block)

    def by_module(x, dw_weight):
        return torch.func.functional_call(block, {"depthwise.weight": dw_weight}, (x,))

    def by_function(x, dw_weight):
        bn1, bn2 = (
            BatchNormArguments(n.running_mean.clone(), n.running_var.clone(), n.weight, n.bias, n.training)
            for n in (block.bn1, block.bn2)
        )
        kinds = {"padding": 1, "activation": "silu", "out_activation": "silu"}
        biases = block.depthwise.bias, block.pointwise.bias
        return depthwise_separable_conv_bn2d(x, dw_weight, block.pointwise.weight, *biases, bn1, bn2, **kinds)

    def by_chain(x, dw_weight):
        chain = DepthwiseSeparableSequence(block)
        return torch.func.functional_call(chain, {"0.depthwise.weight": dw_weight}, (x,))

    x = torch.randn(2, 3, 4, 3, dtype=torch.float64, requires_grad=True)
    return (by_module, by_function, by_chain), (x, block.depthwise.weight.detach().clone().requires_grad_()), block


TRAINED = {
    "both": lambda block: None,
    "first": lambda block: block.bn2.eval(),
    "second": lambda block: block.bn1.eval(),
}


@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("form", range(3), ids=["module", "function", "chain"])
def test_further_derivatives_are_refused_in_a_sentence(trained, form, device):
    forms, inputs, block = _block_and_function(TRAINED[trained])
    block.to(device)
    call, (x, weight) = forms[form], (t.detach().to(device).requires_grad_() for t in inputs)
    (grad,) = torch.autograd.grad(call(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported where a norm takes statistics"):
        grad.sum().backward()
    with (
        pytest.raises(NotImplementedError, match="forward-mode AD is not supported where a norm takes statistics"),
        torch.autograd.forward_ad.dual_level(),
    ):
        call(torch.autograd.forward_ad.make_dual(x.detach(), torch.ones_like(x)), weight)
    with pytest.raises(RuntimeError, match=r"torch\.func transforms are not supported where a norm takes statistics"):
        torch.func.grad(lambda t: call(t, weight).sum())(x.detach())


@pytest.mark.parametrize("form", range(3), ids=["module", "function", "chain"])
def test_further_derivatives_with_frozen_norms(form, isa, device):
    """Of any order, and forward: the norms fold into the weights."""
    if isa == "emulated":
        pytest.skip("second derivatives are stock convolutions, which this backend's device does not change")
    forms, inputs, block = _block_and_function(lambda block: block.eval())
    block.to(device)
    inputs = [t.detach().to(device).requires_grad_() for t in inputs]
    torch.autograd.gradcheck(forms[form], inputs, check_forward_ad=True, fast_mode=True)
    torch.autograd.gradgradcheck(forms[form], inputs, fast_mode=True)


def test_training_lowers_the_loss_like_stock_modules(device):
    torch.manual_seed(1)
    block = Shape(activation="relu6").block().to(device)
    plain = Plain(block)
    x, target = Shape().input().to(device), torch.randn(3, 17, 13, 11, device=device)
    losses = []
    for module in (block, plain):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
        found = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = (module(x) - target).square().mean()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        losses.append(found)
    assert losses[0][-1] < losses[0][0]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant, device):
    """Running statistics move in the forward and again in the one of backward, as those of stock modules."""
    from torch.utils.checkpoint import checkpoint

    block, x = Shape(out_activation="silu").block().to(device), Shape().input().to(device).requires_grad_()
    plain = Plain(block)
    expected = torch.autograd.grad(copy.deepcopy(block)(x).square().sum(), x)[0]
    checkpoint(block, x, use_reentrant=reentrant).square().sum().backward()
    assert torch.equal(x.grad, expected)
    checkpoint(plain, x, use_reentrant=reentrant).square().sum().backward()
    assert block.bn2.num_batches_tracked == 2
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(block.get_buffer(name), buffer, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_statistics_move_without_gradients(mode, device):
    block, x = Shape().block().to(device), Shape().input().to(device)
    plain = Plain(block)
    with mode():
        out, expected = block(x), plain(x)
    assert not out.requires_grad
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(block.get_buffer(name), buffer, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_what_it_reaches_in_stock_modules(value, device):
    """The channel's statistics, through the pointwise part every output, and every gradient of a weight."""
    block, x = Shape().block().to(device), Shape().input().to(device)
    x[0, 3, 5, 5] = value
    plain = Plain(block)
    out, expected = block(x), plain(x)
    assert torch.equal(out.isfinite(), expected.isfinite())
    for name, buffer in plain.named_buffers():
        assert torch.equal(block.get_buffer(name).isfinite(), buffer.isfinite()), name
    out.sum().backward()
    assert not block.pointwise.weight.grad.isfinite().any()


def test_functional_call(device):
    """Gradients go to the parameters that are given, and the running statistics that are given move."""
    block, x = Shape().block().to(device), Shape().input().to(device)
    given = {name: value.detach().clone().requires_grad_() for name, value in block.named_parameters()}
    buffers = {name: value.clone() for name, value in block.named_buffers()}
    before = copy.deepcopy(block.state_dict())
    other = copy.deepcopy(block)
    torch.func.functional_call(block, (given, buffers), (x,)).square().sum().backward()
    other(x).square().sum().backward()
    for name, parameter in other.named_parameters():
        assert torch.equal(given[name].grad, parameter.grad)
    for name, buffer in other.named_buffers():
        assert torch.equal(buffers[name], buffer)
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())


def test_a_build_without_the_kernels_says_so(device, monkeypatch):
    """Statistics of the batch need kernels of their own; given ones fold into the weights and need none."""
    from dsconv_cuda import _loader, batchnorm, batchnorm_training

    block, x = Shape().block().to(device), Shape().input().to(device)
    monkeypatch.setattr(batchnorm_training, "step", lambda *args, **kwargs: None)  # has none either
    monkeypatch.setattr(batchnorm, "_devices_with_kernels", set())
    monkeypatch.setattr(_loader, "batch_norm_kernels_loaded", lambda device_type: False)
    with pytest.raises(RuntimeError, match=r"this build has no kernels on .* freeze the norms with \.eval\(\)"):
        block(x)
    assert block.bn1.num_batches_tracked == 0
    block.eval()(x)


# ---- what is kept for backward ---------------------------------------------------------------------------------------

# The blocks of MobileNetV1: input channels, output channels, stride, size of the map (half of the network's).
MOBILENET = [
    (32, 64, 1, 56), (64, 128, 2, 56), (128, 128, 1, 28), (128, 256, 2, 28), (256, 256, 1, 14), (256, 512, 2, 14),
    *[(512, 512, 1, 7)] * 5, (512, 1024, 2, 7), (1024, 1024, 1, 4),
]  # fmt: skip


def test_bytes_kept_for_backward(isa, device):
    """The input, y, and vectors of the channels: over the blocks of MobileNetV1 at most 45 % of stock modules' bytes,
    and with recompute_output at most 25 %, the input counted in both."""
    if isa == "emulated":
        pytest.skip("says the same on every backend, and takes long on this one")
    stock = kept = recomputed = 0
    for c_in, c_out, stride, size in MOBILENET:
        block = DepthwiseSeparableConvBN2d(c_in, c_out, 3, stride, 1, activation="relu6", out_activation="relu6")
        block.to(device)
        x = torch.randn(2, c_in, size, size, device=device, requires_grad=True)
        plain = Plain(block)
        stock += saved_bytes(plain, partial(plain, x))
        here = saved_bytes(block, partial(block, x))
        block.recompute_output = True
        again = saved_bytes(block, partial(block, x))
        vectors = 4 * 8 * (c_in + c_out)
        assert here <= x.nbytes + block(x).nbytes + vectors
        assert again <= x.nbytes + vectors
        kept += here
        recomputed += again
    assert kept <= 0.45 * stock
    assert recomputed <= 0.25 * stock


# ---- compiled --------------------------------------------------------------------------------------------------------


def test_compiled(device):
    block = Shape(out_activation="silu").block().to(device)
    x = Shape().input().to(device).requires_grad_()
    other = copy.deepcopy(block)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(other)
        out, expected = compiled(x), block(x)
        torch.testing.assert_close(out, expected)
        grads = torch.autograd.grad(out.square().sum(), [x, *other.parameters()])
        wanted = torch.autograd.grad(expected.square().sum(), [x, *block.parameters()])
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, want)
    for name, buffer in block.named_buffers():
        torch.testing.assert_close(other.get_buffer(name), buffer)


def test_exported_names():
    for name in ("BatchNormArguments", "DepthwiseSeparableConvBN2d", "depthwise_separable_conv_bn2d"):
        assert name in dsconv_cuda.__all__
