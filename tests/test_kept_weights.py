"""Packed weights kept between calls: never stale, never in the way, gone with the module."""

import copy
import gc
import io
import pickle
import threading
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import dsconv_cuda
from dsconv_cuda import DepthwiseSeparableConv2d, _loader, kept_weights

pytestmark = [pytest.mark.usefixtures("isa")]


@pytest.fixture(autouse=True)
def _kept_at_all(device):
    _loader.load_library()
    if device.type != "cpu" or not kept_weights.kept_kernels():
        pytest.skip("these kernels keep nothing")


def _module(c=20, c_out=36, **kwargs) -> DepthwiseSeparableConv2d:
    arguments = {"padding": 1, "bias": True, "activation": "relu", "out_activation": "silu"} | kwargs
    return DepthwiseSeparableConv2d(c, c_out, 3, **arguments)


def _by_function(module, x):
    """The same without anything kept."""
    return module._forward(x)


def _settled(module, x) -> DepthwiseSeparableConv2d:
    """`module` with its weights packed and used: the first call checks, the second packs, the third reads."""
    with torch.no_grad():
        for _ in range(3):
            module(x)
    assert module._kept_call is not None
    return module


@torch.no_grad()
def _check(module, x):
    expected = _by_function(module, x)
    for _ in range(3):
        assert torch.equal(module(x), expected)


X = torch.Size((2, 20, 9, 7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_same_bits(dtype, channels_last):
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    for arguments in ({}, {"bias": False}, {"channel_multiplier": 3}, {"padding": "same"}, {"stride": (2, 1)}):
        module = _module(**arguments).to(dtype)
        x = torch.randn(X, dtype=dtype).contiguous(memory_format=memory_format)
        _check(_settled(module, x), x)
        _check(module, torch.randn(1, 20, 30, 30, dtype=dtype))  # the packed weights serve any size of input
        _check(module, x[:0])
        with torch.no_grad():
            assert torch.equal(module(x[0]), _by_function(module, x[0]))


def _optimizer_step(module, x):
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    module(x).square().sum().backward()
    optimizer.step()


@torch.no_grad()
def _in_place(module, x):
    module.pointwise.weight[3, 5] += 1


@torch.no_grad()
def _depthwise_bias(module, x):
    module.depthwise.bias[2] = 4


@torch.inference_mode()
def _in_inference_mode(module, x):
    module.pointwise.bias.add_(1)


def _through_data(module, x):
    module.pointwise.weight.data.normal_()


def _one_element_through_data(module, x):
    module.pointwise.weight.data[7, 7] += 1  # a small matrix is compared as a whole


def _other_data(module, x):
    module.depthwise.weight.data = torch.randn_like(module.depthwise.weight)


def _through_numpy(module, x):
    module.pointwise.weight.detach().numpy()[:] *= 2


def _other_parameter(module, x):
    module.pointwise.weight = nn.Parameter(torch.randn_like(module.pointwise.weight))


def _no_bias(module, x):
    module.depthwise.bias = None


def _other_child(module, x):
    module.depthwise = nn.Conv2d(20, 20, 5, padding=2, groups=20)


def _larger_kernel(module, x):
    module.depthwise.weight.data = torch.randn(20, 1, 5, 5)
    module.depthwise.padding = (2, 2)


def _other_arguments(module, x):
    module.depthwise.stride = (2, 2)
    module.activation = "gelu"


def _load(module, x):
    module.load_state_dict(_module().state_dict())


def _load_assigned(module, x):
    module.load_state_dict(_module().state_dict(), assign=True)


def _cast_and_back(module, x):
    module.bfloat16().float()


def _parametrized(module, x):
    nn.utils.parametrizations.weight_norm(module.pointwise)
    with torch.no_grad():
        module.pointwise.parametrizations.weight.original0.mul_(2)


def _pruned(module, x):
    from torch.nn.utils import prune

    prune.l1_unstructured(module.pointwise, "weight", 0.5)


def _shared_memory(module, x):
    module.share_memory()
    module.pointwise.weight.data.mul_(3)


CHANGES = (
    _optimizer_step,
    _in_place,
    _depthwise_bias,
    _in_inference_mode,
    _through_data,
    _one_element_through_data,
    _other_data,
    _through_numpy,
    _other_parameter,
    _no_bias,
    _other_child,
    _larger_kernel,
    _other_arguments,
    _load,
    _load_assigned,
    _cast_and_back,
    _parametrized,
    _pruned,
    _shared_memory,
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
def test_a_change_is_noticed(change):
    x = torch.randn(X)
    module = _settled(_module(), x)
    before = module(x).detach()
    change(module, x)
    if change is not _cast_and_back:
        with torch.no_grad():
            after = module(x)
        assert after.shape != before.shape or not torch.equal(after, before)
    _check(module, x)


@pytest.mark.parametrize(("c", "c_out"), [(300, 200), (200, 300), (1000, 40), (40, 1000)])
def test_a_row_or_a_column_written_behind_pytorch(c, c_out):
    """Of large matrices a part is compared, and that has a bit of every row and of every column."""
    x = torch.randn(1, c, 2, 2)
    module = _settled(_module(c, c_out, activation=None, out_activation=None, padding=1), x)
    for index in (0, 1, c_out // 2, c_out - 1):
        module.pointwise.weight.data[index] += 1
        _check(module, x)
    for index in (0, 1, c // 2, c - 1):
        module.pointwise.weight.data[:, index] += 1
        module.depthwise.weight.data[index] += 1
        _check(module, x)


@pytest.mark.one_isa
def test_what_is_not_noticed_until_the_cache_is_cleared():
    """The limit that kept_weights.py states; where this fails it states too much."""
    x = torch.randn(1, 512, 3, 3)
    module = _settled(_module(512, 512), x)
    module.pointwise.weight.data[0, 300] += 100
    with torch.no_grad():
        assert not torch.equal(module(x), _by_function(module, x))
    dsconv_cuda.clear_weight_cache()
    _check(module, x)


@pytest.mark.one_isa
def test_training_takes_no_part():
    x = torch.randn(X)
    module = _settled(_module(), x)
    reference = _module()
    reference.load_state_dict(module.state_dict())
    for m in (module, reference):
        optimizer = torch.optim.SGD(m.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            m(x).square().mean().backward()
            optimizer.step()
            with torch.no_grad():
                m(x)
    for p, q in zip(module.parameters(), reference.parameters(), strict=True):
        assert torch.equal(p, q)
    x.requires_grad_()
    module.requires_grad_(False)
    assert module(x).requires_grad
    assert not module(x.detach()).requires_grad


@pytest.mark.one_isa
@torch.no_grad()
def test_transforms_modes_and_autocast_go_the_long_way(monkeypatch):
    x = torch.randn(X)
    module = _settled(_module(), x)
    expected = _by_function(module, x)

    def never(*_):
        raise AssertionError("the kept weights were used")

    call = module._kept_call
    call.op = never

    def still_there():
        assert module._kept_call is call

    torch.testing.assert_close(torch.func.vmap(module)(x[None])[0], expected)
    still_there()
    _, tangent = torch.func.jvp(module, (x,), (x,))
    assert tangent.abs().sum() > 0
    still_there()
    with torch.autocast("cpu"):
        assert module(x).dtype == torch.bfloat16
    still_there()
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False):
        module(x)
    still_there()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(module, x, check_trace=False)
    assert "fwd_kept" not in str(traced.graph)
    still_there()

    class Sub(torch.Tensor):
        pass

    assert type(module(x.as_subclass(Sub))) is Sub
    still_there()
    with torch.device("meta"):
        assert module(x).device.type == "cpu"
    still_there()


def _training_step(forward, module, x, dy, asked):
    """The output and the gradients of the `asked` ones of (x, parameters...)."""
    tensors = (x.detach().requires_grad_(), *module.parameters())
    for t, wanted in zip(tensors, asked, strict=True):
        t.requires_grad_(wanted)
    y = forward(tensors[0])
    return (y, *torch.autograd.grad(y, [t for t, wanted in zip(tensors, asked, strict=True) if wanted], dy))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_training_steps_under_autocast(dims, dtype):
    """By the short way as well, with the casts that the long one makes."""
    kind = getattr(dsconv_cuda, f"DepthwiseSeparableConv{dims}d")
    module, x = kind(20, 36, 3, padding=1, bias=True, activation="silu"), torch.randn(2, 20, *(9, 7, 5)[:dims])
    module(x)
    call = module._kept_call
    with torch.autocast("cpu", dtype):
        for inputs in (x, x.to(dtype)):
            dy = torch.randn(module(inputs).shape).to(dtype)
            ours, expected = (
                _training_step(forward, module, inputs, dy, (True,) * 5) for forward in (module, module._forward)
            )
            assert ours[0].dtype == dtype
            for our, other in zip(ours, expected, strict=True):
                assert our.dtype == other.dtype
                assert torch.equal(our, other)
    assert module._kept_call is call
    with pytest.raises((TypeError, RuntimeError), match="dtype"), torch.autocast("cpu", dtype):
        module(x.double())


@pytest.mark.parametrize("out_activation", ["identity", "relu6", "hardswish"])
@pytest.mark.parametrize("bias", [False, True])
def test_training_steps_the_same_bits(out_activation, bias):
    x, dy = torch.randn(X), torch.randn(2, 36, 9, 7)
    module = _settled(_module(bias=bias, out_activation=out_activation), x)
    call = module._kept_call
    count = 1 + len(list(module.parameters()))
    masks = [[i != left_out for i in range(count)] for left_out in range(count + 1)]
    for asked in (*masks, *([i == alone for i in range(count)] for alone in range(count))):
        results = [_training_step(forward, module, x, dy, asked) for forward in (module, module._forward)]
        for ours, expected in zip(*results, strict=True):
            assert torch.equal(ours, expected)
            assert ours.stride() == expected.stride()
    assert module._kept_call is call
    weight = module.pointwise.weight.requires_grad_()
    assert torch.autograd.grad(module(x[:0]).sum(), weight)[0].eq(0).all()


@pytest.mark.one_isa
@pytest.mark.parametrize("out_activation", ["identity", "relu6", "silu"])
def test_a_plain_step_can_be_differentiated_again(out_activation):
    x, dy = torch.randn(X, dtype=torch.float64), torch.randn(2, 36, 9, 7, dtype=torch.float64)
    module = _settled(_module(activation="gelu", out_activation=out_activation).double(), x)

    def penalty(forward):
        leaf = x.detach().requires_grad_()
        (grad,) = torch.autograd.grad(forward(leaf), leaf, dy, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), (leaf, module.depthwise.weight, module.pointwise.weight))

    for ours, expected in zip(penalty(module), penalty(module._forward), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.one_isa
def test_modes_and_transforms_around_the_backward_alone_see_the_ops_they_know():
    x = torch.randn(X)
    module = _settled(_module(), x)
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    y = module(x)
    with Watch():
        y.sum().backward()
    assert "dsconv_cuda.bwd.default" in seen
    assert not any("kept" in name for name in seen)

    y = module(x.requires_grad_())
    dys = torch.randn(3, *y.shape)
    batched = torch.autograd.grad(y, x, dys, is_grads_batched=True, retain_graph=True)[0]
    torch.testing.assert_close(batched[1], torch.autograd.grad(y, x, dys[1], retain_graph=True)[0])
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(dys[0], dys[1])
        grad = torch.autograd.forward_ad.unpack_dual(torch.autograd.grad(y, x, dual)[0])
    torch.testing.assert_close(grad.tangent, batched[1])


@pytest.mark.one_isa
def test_functional_call_uses_the_weights_it_is_given():
    x = torch.randn(X)
    module = _settled(_module(), x)
    other = {name: torch.randn_like(p) for name, p in module.named_parameters()}
    with torch.no_grad():
        for weights in (other, {name: nn.Parameter(p) for name, p in other.items()}):
            y = torch.func.functional_call(module, weights, (x,))
            reference = _module()
            reference.load_state_dict(other)
            assert torch.equal(y, reference(x))
    _check(module, x)


@pytest.mark.one_isa
def test_wrong_inputs_say_the_same_as_ever():
    module = _settled(_module(), torch.randn(X))
    with torch.no_grad():
        for wrong, error, text in (
            (torch.randn(2, 19, 9, 7), ValueError, "input must have 20 channels, as many as .depthwise takes, got 19"),
            (torch.randn(X).double(), TypeError, "must have the dtype of input"),
            (torch.randn(X).to_sparse(), TypeError, "input must be a dense tensor"),
            (torch.empty(X, device="meta"), RuntimeError, "must be on the device of input"),
            ([1.0], TypeError, "input must be a Tensor, got list"),
        ):
            with pytest.raises(error, match=text):
                module(wrong)
    _check(module, torch.randn(X))


def test_another_instruction_set():
    library = _loader.load_library().module
    if library is None:
        pytest.skip("the library of this backend has one set of kernels")
    active = library.isa_active()
    x = torch.randn(X)
    module = _settled(_module(), x)
    try:
        for name in (*library.isa_available(), *library.isa_available()):
            library.set_isa(name)
            _check(module, x)
    finally:
        library.set_isa(active)


@pytest.mark.one_isa
def test_copies_and_files_hold_nothing_of_it():
    x = torch.randn(X)
    fresh = _module()
    size = len(pickle.dumps(fresh))
    module = _settled(fresh, x)
    assert len(pickle.dumps(module)) == size
    assert set(module.state_dict()) == {f"{c}wise.{p}" for c in ("depth", "point") for p in ("weight", "bias")}
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for other in (
        copy.deepcopy(module),
        copy.copy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(file, weights_only=False),
    ):
        assert other._kept_call is None
        _check(_settled(other, x), x)
    _check(module, x)


@pytest.mark.one_isa
def test_two_modules_share_weights():
    x = torch.randn(X)
    one, two = _module(), _module(stride=2, activation="gelu")
    two.depthwise.weight, two.pointwise.weight = one.depthwise.weight, one.pointwise.weight
    for _ in range(2):
        _check(_settled(one, x), x)
        _check(_settled(two, x), x)
        with torch.no_grad():
            one.pointwise.weight.mul_(2)


@pytest.mark.one_isa
def test_memory_goes_with_the_module():
    x = torch.randn(X)
    module = _settled(_module(), x)
    kept = weakref.ref(module._kept_call)
    gc.disable()  # no cycle keeps it
    try:
        del module
        assert kept() is None
    finally:
        gc.enable()
    module = _settled(_module(), x)
    kept = weakref.ref(module._kept_call)
    module.double()
    assert kept() is None


@pytest.mark.one_isa
def test_threads():
    """Calls at once, while the kept weights are dropped and change between rounds."""
    x = torch.randn(1, 64, 6, 6)
    module = _settled(_module(64, 96), x)
    wrong = []

    def work(expected):
        with torch.no_grad():
            for _ in range(50):
                if not torch.equal(module(x), expected):
                    wrong.append(threading.get_ident())

    for index in range(6):
        with torch.no_grad():
            module.pointwise.weight.normal_()
            expected = _by_function(module, x)
        if index % 2:
            dsconv_cuda.clear_weight_cache()
        threads = [threading.Thread(target=work, args=(expected,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


@pytest.mark.one_isa
def test_the_op_refuses_memory_that_is_not_its_own():
    x, dw, pw = torch.randn(X), torch.randn(20, 1, 3, 3), torch.randn(8, 20)
    ops = torch.ops.dsconv_cuda
    memory = ops.keep(dw, pw, (1, 1), (1, 1, 1, 1), (1, 1), 0, 0)
    assert ops.fwd_kept(x, dw, pw, None, None, memory, 0).shape == (2, 8, 9, 7)
    for wrong in (torch.zeros(10_000, dtype=torch.uint8), torch.zeros(0, dtype=torch.uint8), x, memory[:-1]):
        with pytest.raises(RuntimeError, match="keep"):
            ops.fwd_kept(x, dw, pw, None, None, wrong, 0)
    with pytest.raises(RuntimeError, match="other sizes"):
        ops.fwd_kept(x, dw, pw[:4], None, None, memory, 0)
    arguments = ops.keep(dw, pw, (1, 1), (1, 1, 1, 1), (1, 1), 0, 0, False)
    assert torch.equal(
        ops.fwd_kept(x, dw, pw, None, None, arguments, 0), ops.fwd_kept(x, dw, pw, None, None, memory, 0)
    )
    for wrong, what in ((x, "keep"), (arguments[:-1], "keep")):
        with pytest.raises(RuntimeError, match=what):
            ops.bwd_kept(torch.randn(2, 8, 9, 7), x, dw, pw, None, None, wrong, 31)
    with pytest.raises(RuntimeError, match="other sizes"):
        ops.bwd_kept(torch.randn(2, 4, 9, 7), x, dw, pw[:4], None, None, arguments, 31)


def _check_changes(module, x, *changes):
    """The same bits as without anything kept, batched and not, before and after changes."""
    written = (lambda: module.pointwise.weight.data.mul_(2), lambda: module.depthwise.weight[0].fill_(1))
    for change in (lambda: None, *written, *changes):
        with torch.no_grad():
            change()
            expected = module._forward(x)
            for _ in range(3):
                assert torch.equal(module(x), expected)
            assert torch.equal(module(x[0]), module._forward(x[0]))
    module(x)
    assert module._kept_call is not None


def _check_gradients_and_copies(module, *inputs):
    for x in inputs:
        grads = [torch.autograd.grad(call(x).square().sum(), module.parameters()) for call in (module, module._forward)]
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(*grads, strict=True))
    assert "_kept_call" not in vars(pickle.loads(pickle.dumps(module)))


@pytest.mark.parametrize("channels_last", [False, True])
def test_three_dimensions(channels_last):
    """DepthwiseSeparableConv3d keeps its weights as well: the same bits, and a change is noticed."""
    torch.manual_seed(0)
    module = dsconv_cuda.DepthwiseSeparableConv3d(20, 24, 3, padding=1, bias=True, activation="silu")
    memory_format = torch.channels_last_3d if channels_last else torch.contiguous_format
    x = torch.randn(2, 20, 3, 9, 7).contiguous(memory_format=memory_format)
    _check_changes(module, x)
    _check_gradients_and_copies(module, x)


@pytest.mark.parametrize("padding", [2, "same", "causal"])
def test_one_dimension(padding):
    """DepthwiseSeparableConv1d too, whose weights are handed on as those of rows."""
    torch.manual_seed(0)
    module = dsconv_cuda.DepthwiseSeparableConv1d(20, 24, 3, padding=padding, bias=True, activation="silu")
    x = torch.randn(2, 20, 33)

    def exchange():
        module.pointwise.weight.data = torch.randn(24, 20, 1)

    def widen():
        module.depthwise.dilation = (2,)

    def turn_causal():
        module.causal, module.depthwise.padding = not module.causal, (0,)

    _check_changes(module, x, exchange, widen, turn_causal)
    _check_gradients_and_copies(module, x, x[1])
    with pytest.raises(ValueError, match=r"\[N, C, L\]"):
        module(x[None])
