"""A block in evaluation: its norms fold into the weights once, and again when something has changed."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import dsconv_cuda
from bench.accuracy import Plain
from dsconv_cuda import clear_weight_cache, compiled_folding, compiled_weights, folded, locks
from dsconv_cuda.seen import _compares_itself

pytestmark = [pytest.mark.usefixtures("isa"), pytest.mark.one_isa]

BLOCKS = {
    1: dsconv_cuda.DepthwiseSeparableConvBN1d,
    2: dsconv_cuda.DepthwiseSeparableConvBN2d,
    3: dsconv_cuda.DepthwiseSeparableConvBN3d,
}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def build(device, dims=2, bias=False, **kwargs):
    block = BLOCKS[dims](6, 96, 3, 2, 1, bias=bias, activation="silu", **kwargs)
    for norm in (block.bn1, block.bn2):
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.2, 2)
        nn.init.normal_(norm.weight, 1, 0.3)
        nn.init.normal_(norm.bias)
    return block.to(device).eval()


def image(device, dims=2):
    return torch.randn(2, 6, *(9, 7, 5)[:dims], device=device)


@pytest.fixture
def folds(monkeypatch, device):
    """The convolutions that were folded, in a list that grows."""
    if not _compares_itself(device.type):
        pytest.skip("every call folds")
    seen, fold_norm = [], folded.fold_norm

    def counted(weight, *arguments):
        seen.append(weight)
        return fold_norm(weight, *arguments)

    monkeypatch.setattr(folded, "fold_norm", counted)
    return seen


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_once(dims, bias, folds, device):
    block, x = build(device, dims, bias), image(device, dims)
    for _ in range(4):
        torch.testing.assert_close(block(x), Plain(block)(x), **CLOSE)
    assert len(folds) == 2
    block(image(device, dims)[:1])
    assert len(folds) == 2


@torch.no_grad()
@pytest.mark.parametrize("gone", ["bn1", "bn2", "both"])
def test_identities_and_synchronised_norms(gone, folds, device):
    block, x = nn.SyncBatchNorm.convert_sync_batchnorm(build(device)), image(device)
    for name in ("bn1", "bn2"):
        if gone in (name, "both"):
            setattr(block, name, nn.Identity())
    for _ in range(3):
        torch.testing.assert_close(block(x), Plain(block)(x), **CLOSE)
    assert len(folds) == (0 if gone == "both" else 1)


def _step(block, x):
    with torch.enable_grad():
        block.train()(x).square().mean().backward()
    torch.optim.SGD(block.parameters(), lr=0.1).step()
    block.eval()


CHANGES = {
    "a training step": _step,
    "statistics": lambda block, x: block.bn1.running_mean.add_(1),
    "statistics behind PyTorch": lambda block, x: block.bn2.running_var.data.add_(1),
    "weight": lambda block, x: block.pointwise.weight[:, 1].add_(1),
    "weight behind PyTorch": lambda block, x: block.depthwise.weight.data.mul_(2),
    "a column behind PyTorch": lambda block, x: block.pointwise.weight.data[:, 3].zero_(),
    "a tap behind PyTorch": lambda block, x: block.depthwise.weight.data[:, :, 1, 1].fill_(5),
    "other data": lambda block, x: setattr(block.bn1.weight, "data", torch.rand_like(block.bn1.weight)),
    "loaded": lambda block, x: block.load_state_dict(build(x.device).state_dict()),
    "assigned": lambda block, x: block.load_state_dict(build(x.device).state_dict(), assign=True),
    "eps": lambda block, x: setattr(block.bn1, "eps", 0.5),
    "another norm": lambda block, x: setattr(block, "bn1", build(x.device).bn1),
    "no norm": lambda block, x: setattr(block, "bn2", nn.Identity()),
    "another convolution": lambda block, x: setattr(block, "pointwise", build(x.device).pointwise),
    "activation": lambda block, x: setattr(block, "activation", "tanh"),
    "padding": lambda block, x: setattr(block.depthwise, "padding", (0, 0)),
    "padding mode": lambda block, x: vars(block.depthwise).update(vars(_reflecting(block))),
    "hook": lambda block, x: block.bn1.register_forward_hook(lambda module, inputs, y: y + 1),
    "pruned": lambda block, x: prune.ln_structured(block.pointwise, "weight", 0.5, 2, 0),
    "parametrized": lambda block, x: parametrize.register_parametrization(block.pointwise, "weight", nn.Softmax(0)),
    "frozen": lambda block, x: block.requires_grad_(False).depthwise.weight.neg_(),
    "moved": lambda block, x: block.to(torch.float64).to(torch.float32).bn1.bias.add_(1),
    "statistics of the batch": lambda block, x: [setattr(block.bn2, n, None) for n in ("running_mean", "running_var")],
}


def _reflecting(block):
    old = block.depthwise
    arguments = (old.in_channels, old.out_channels, old.kernel_size, old.stride, old.padding)
    return nn.Conv2d(*arguments, groups=old.groups, bias=False, padding_mode="reflect").to(old.weight.device)


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_noticed(change, device):
    block, x = build(device), image(device)
    for _ in range(3):
        before = block(x)
    CHANGES[change](block, x)
    for _ in range(3):
        after = block(x)
        assert before.shape != after.shape or not torch.allclose(before, after)
        torch.testing.assert_close(after, Plain(block)(x), **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("of", ["block", "fused model"])
def test_clear_weight_cache_makes_the_rest_noticed(of, device):
    block, x = build(device), image(device)
    module = block
    if of == "fused model":
        parts = (block.depthwise, block.bn1, nn.SiLU(), block.pointwise, block.bn2, nn.ReLU())
        module = dsconv_cuda.fuse(nn.Sequential(*parts), inplace=True)
    for _ in range(3):
        module(x)
    weight = block.pointwise.weight
    weight.data[40, 3] += 5  # of a matrix of which not all is compared, and not counted
    clear_weight_cache()
    expected = Plain(block)(x) if of == "block" else dsconv_cuda.unfuse(module)(x)
    torch.testing.assert_close(module(x), expected, **CLOSE)


def test_inference_mode(folds, device):
    """What is kept there serves calls outside of it, and the other way round."""
    x = image(device)
    for modes in ((torch.inference_mode, torch.no_grad), (torch.no_grad, torch.inference_mode)):
        block = build(device).requires_grad_(False)
        del folds[:]
        for mode in (*modes, torch.enable_grad, *modes):
            with mode():
                for _ in range(3):
                    torch.testing.assert_close(block(x), Plain(block)(x), **CLOSE)
        assert len(folds) == 2
        block.bn1.bias.add_(1)
        with torch.inference_mode():
            torch.testing.assert_close(block(x), Plain(block)(x), **CLOSE)
        torch.testing.assert_close(block(x), Plain(block)(x), **CLOSE)
        assert len(folds) == 4


def test_gradients(folds, device):
    """Those of parameters need the folding in the graph; those of the input alone do not."""
    block, x = build(device), image(device).requires_grad_()
    with torch.no_grad():
        block(x), block(x)
    assert len(folds) == 2
    for wanted in (True, False):
        block.requires_grad_(wanted)
        actual, expected = (
            torch.autograd.grad(m(x).square().sum(), [x, *(m.parameters() if wanted else ())])
            for m in (block, Plain(block))
        )
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
    assert len(folds) == 2


@torch.no_grad()
def test_copies_and_moves_take_nothing_along(device):
    block, x = build(device), image(device)
    expected = [block(x) for _ in range(3)][-1]
    for copied in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert "_folded" not in vars(copied)
        copied.bn1.bias.add_(1)
        assert not torch.allclose(copied(x), expected)
    torch.testing.assert_close(block(x), expected)
    assert "_folded" not in vars(block.double())
    for _ in range(3):
        torch.testing.assert_close(block(x.double()).float(), expected, **CLOSE)


@torch.no_grad()
def test_what_does_not_fit_raises_still(device):
    block, x = build(device), image(device)
    block(x), block(x)
    with pytest.raises(ValueError, match=r"input must have shape \[N, C, H, W\]"):
        block(x[0])
    with pytest.raises((TypeError, RuntimeError), match="dtype"):
        block(x.double())
    block.bn1.weight = nn.Parameter(torch.ones(5, device=device))
    with pytest.raises(ValueError, match=r"bn1.weight must have shape \[6\], got \[5\]"):
        block(x)
    block.bn1 = nn.GroupNorm(2, 6).to(device)
    with pytest.raises(
        TypeError, match=r"bn1 must be an nn.BatchNorm2d.*got torch\.nn\.modules\.normalization\.GroupNorm"
    ):
        block(x)


@torch.no_grad()
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_compiled(dims, device, monkeypatch):
    """One op, which keeps the folded weights and notices what changes."""
    monkeypatch.setattr(compiled_folding, "LEAST_ELEMENTS", 1)
    if device.type != "cpu" or not compiled_weights.registered:
        pytest.skip("these kernels keep nothing")
    torch._dynamo.reset()
    compiled_weights.clear()
    ops = []

    def backend(graph, inputs):
        ops.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    block, x = build(device, dims), image(device, dims)
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    for _ in range(3):
        torch.testing.assert_close(compiled(x), Plain(block)(x), **CLOSE)
    assert ops == ["dsconv_cuda.fwd_folded"]
    assert sum(kept.folds for entries in compiled_folding._kept.values() for kept in entries) == 1
    block.bn2.running_mean.add_(1)
    torch.testing.assert_close(compiled(x), Plain(block)(x), **CLOSE)
    torch._dynamo.reset()


@torch.no_grad()
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("of", ["block", "fused model", "fused model without norms"])
def test_autocast(of, dims, folds, device):
    """Folded weights are kept in its dtype; changes are noticed by calls under it and outside, whatever the dtype."""
    block, x = build(device, dims), image(device, dims)
    parts = (block.depthwise, block.bn1, nn.SiLU(), block.pointwise, block.bn2, nn.ReLU())
    if of == "fused model without norms":
        parts = (block.depthwise, nn.SiLU(), block.pointwise)
    module = block if of == "block" else dsconv_cuda.fuse(nn.Sequential(*parts), inplace=True)
    plain = Plain(block) if of == "block" else dsconv_cuda.unfuse(module)

    def check():
        for dtype in (torch.bfloat16, None, torch.float16, torch.bfloat16):
            with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
                results = [module(x) for _ in range(4)]
                expected = (Plain(block) if of == "block" else plain)(x)
            assert {y.dtype for y in results} == {dtype or torch.float32}
            assert all(torch.equal(results[0], y) for y in results)
            eps = torch.finfo(dtype or torch.float32).eps
            torch.testing.assert_close(results[0], expected, rtol=8 * eps, atol=8 * eps * float(expected.abs().max()))

    check()
    before = len(folds)
    with torch.autocast(device.type, torch.bfloat16):
        module(x), module(x)
    assert len(folds) == before  # kept
    block.pointwise.weight.data.mul_(1.5)
    if of != "fused model without norms":
        block.bn2.running_mean.add_(0.5)
    check()
    assert module(x.double().float()).dtype == torch.float32


def test_threads_under_autocast_and_not(device):
    block, x = build(device), image(device)
    wrong, expected = [], {}
    dtypes = (None, torch.bfloat16, torch.float16)

    def run(dtype, check=True):
        with torch.no_grad(), torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            for _ in range(20):
                y = block(x)
                if check and not torch.equal(y, expected[dtype]):
                    wrong.append(dtype)
        return y

    for dtype in dtypes:
        expected[dtype] = run(dtype, False)
    threads = [threading.Thread(target=run, args=(dtype,)) for dtype in dtypes * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("norms", [True, False])
def test_training_of_a_fused_model_under_autocast(norms, device):
    """Every call has the gradients of the first: what is kept for evaluation has none."""
    block, x = build(device), image(device)
    parts = (block.depthwise, block.bn1, nn.SiLU(), block.pointwise, block.bn2)
    if not norms:
        parts = (block.depthwise, nn.SiLU(), block.pointwise)
    fused = dsconv_cuda.fuse(nn.Sequential(*parts), inplace=True)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        fused(x), fused(x)
    for _ in range(3):
        fused.zero_grad()
        with torch.autocast(device.type, torch.bfloat16):
            loss = fused(x).float().square().mean()
        loss.backward()
        assert all(p.grad is not None for p in fused.parameters())


@torch.no_grad()
def test_meta_tensors_again_and_again():
    block = build("cpu").to("meta")
    for _ in range(4):
        assert block(torch.empty(2, 6, 9, 7, device="meta")).shape == (2, 96, 5, 4)


@torch.no_grad()
def test_other_buffers_are_not_looked_at(device):
    block, x = build(device), image(device)
    block.depthwise.register_buffer("mask", torch.ones(3).to_sparse())
    block.bn1.register_buffer("elsewhere", torch.empty(3, device="meta"))
    for _ in range(4):
        torch.testing.assert_close(block(x), Plain(block)(x), **CLOSE)


@torch.no_grad()
def test_it_goes_with_its_last_reference(device):
    block, x = build(device), image(device)
    for _ in range(3):
        block(x)
    gone = weakref.ref(block)
    gc.collect()
    gc.disable()
    try:
        del block
        assert gone() is None
    finally:
        gc.enable()


def test_a_call_within_a_call(device):
    block, x = build(device).requires_grad_(False), image(device).requires_grad_()
    within = []

    def pack(t):
        if not within:
            within.append(None)
            with torch.no_grad():
                within.append(block(x))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = block(x)
    torch.testing.assert_close(within[1], y)


@torch.no_grad()
def test_a_child_process_has_locks_of_its_own(device):
    """A thread that holds one is not there after a fork."""
    block, x = build(device), image(device)
    expected = [block(x) for _ in range(3)][-1]
    block._folded.lock.__enter__()
    locks.renew_all()  # what fork() calls in the child
    assert torch.equal(block(x), expected)
