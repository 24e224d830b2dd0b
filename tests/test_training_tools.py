"""What people wrap around a module in training, each against the same two convolutions of PyTorch or against itself.

Compiling, exports, transforms and autocast of single calls have files of their own.
"""

import copy
import threading
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from torch.utils.data import DataLoader, Dataset

from dsconv_cuda import DepthwiseSeparableConv2d

pytestmark = [pytest.mark.usefixtures("isa"), pytest.mark.one_isa]


def _block(device="cpu", c=4, c_out=6, **kwargs) -> DepthwiseSeparableConv2d:
    arguments = {"padding": 1, "bias": True, "activation": "relu6", "out_activation": "silu"} | kwargs
    return DepthwiseSeparableConv2d(c, c_out, 3, **arguments).to(device)


def _net(device="cpu") -> nn.Sequential:
    return nn.Sequential(_block(device), nn.BatchNorm2d(6), _block(device, 6, 3, stride=2)).to(device)


def _image(device="cpu", n=4) -> torch.Tensor:
    return torch.randn(n, 4, 9, 8, device=device)


def _stock(block: DepthwiseSeparableConv2d, x: torch.Tensor) -> torch.Tensor:
    """By PyTorch's convolutions, with what the two children make of their weights."""
    return nn.functional.silu(block.pointwise(nn.functional.relu6(block.depthwise(x))))


def _gradients(module, loss) -> list[torch.Tensor]:
    module.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in module.parameters()]


# ---- checkpoints of activations, accumulated gradients, hooks --------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant, device):
    net, x = _net(device).eval(), _image(device).requires_grad_()
    expected = _gradients(net, net(x).square().sum())
    assert torch.equal(net(x), checkpoint(net, x, use_reentrant=use_reentrant))
    for run in (
        lambda: checkpoint(net, x, use_reentrant=use_reentrant),
        lambda: checkpoint_sequential(net, 3, x, use_reentrant=use_reentrant),
    ):
        actual = _gradients(net, run().square().sum())
        assert all(map(torch.equal, actual, expected))


def test_gradients_accumulate(device):
    block, x = _block(device), _image(device)
    halves = [_gradients(block, block(half).sum()) for half in x.split(2)]
    block.zero_grad()
    for half in x.split(2):
        block(half).sum().backward()
    for parameter, first, second in zip(block.parameters(), *halves, strict=True):
        assert torch.equal(parameter.grad, first + second)


def test_hooks_of_modules_and_tensors(device):
    block, x = _block(device), _image(device).requires_grad_()
    seen = {}
    block.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))
    block.register_forward_hook(lambda module, inputs, output: 3 * output)
    block.register_full_backward_pre_hook(lambda module, grads: seen.update(before=grads[0]))
    block.register_full_backward_hook(lambda module, inputs, grads: seen.update(inputs=inputs[0]))
    weight = block.depthwise.weight
    weight.register_hook(lambda grad: seen.update(weight=grad.clone()) or 2 * grad)
    block.pointwise.weight.register_post_accumulate_grad_hook(lambda p: seen.update(accumulated=p.grad.clone()))
    y = block(x)
    y.sum().backward()
    plain = _block(device)
    plain.load_state_dict(block.state_dict())
    z = x.detach().requires_grad_()
    out = 3 * plain(2 * z)
    assert torch.equal(y, out)
    out.sum().backward()
    assert torch.equal(seen["before"], torch.ones_like(y))
    assert torch.equal(2 * seen["inputs"], z.grad)
    assert torch.equal(x.grad, z.grad)
    assert torch.equal(seen["weight"], plain.depthwise.weight.grad)
    assert torch.equal(weight.grad, 2 * seen["weight"])
    assert torch.equal(seen["accumulated"], plain.pointwise.weight.grad)


# ---- weights that are something else ---------------------------------------------------------------------------------


@pytest.mark.parametrize("parametrize", [parametrizations.weight_norm, parametrizations.spectral_norm])
@pytest.mark.parametrize("child", ["depthwise", "pointwise"])
def test_parametrizations(parametrize, child, device):
    block, x = _block(device), _image(device)
    parametrize(block.get_submodule(child))
    block.eval()  # spectral_norm turns its vectors at every training call
    actual, expected = _gradients(block, block(x).sum()), _gradients(block, _stock(block, x).sum())
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    with torch.no_grad():
        before = block(x)
    optimizer.step()
    with torch.no_grad():
        assert not torch.allclose(block(x), before)
        torch.testing.assert_close(block(x), _stock(block, x), rtol=1e-4, atol=1e-4)


def test_pruning_masks(device):
    block, x = _block(device), _image(device)
    with torch.no_grad():
        before = block(x)
    for child in ("depthwise", "pointwise"):
        prune.l1_unstructured(block.get_submodule(child), "weight", 0.5)
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    assert not torch.allclose(block(x), before)
    for _ in range(3):
        actual, expected = _gradients(block, block(x).sum()), _gradients(block, _stock(block, x).sum())
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        optimizer.step()
        for child in (block.depthwise, block.pointwise):
            assert not child.weight_orig.grad[child.weight_mask == 0].any()
        with torch.no_grad():
            torch.testing.assert_close(block(x), _stock(block, x), rtol=1e-4, atol=1e-4)
    for child in ("depthwise", "pointwise"):
        prune.remove(block.get_submodule(child), "weight")
    with torch.no_grad():
        torch.testing.assert_close(block(x), _stock(block, x), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("normalize", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_the_older_weight_and_spectral_norm(normalize, device):
    block, x = _block(device), _image(device)
    normalize(block.pointwise)
    block.eval()
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    for _ in range(2):
        actual, expected = _gradients(block, block(x).sum()), _gradients(block, _stock(block, x).sum())
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        optimizer.step()


def test_hooks_of_the_children(device):
    """The result between the two is what such hooks ask for: then PyTorch's convolutions run."""
    block, x = _block(device), _image(device)
    with torch.no_grad():
        expected = block(x)
        block(x)
    seen = []
    handles = [
        block.depthwise.register_forward_hook(lambda module, inputs, output: seen.append(output)),
        block.pointwise.register_full_backward_hook(lambda module, inputs, outputs: seen.append(inputs[0])),
    ]
    y = block(x)
    y.sum().backward()
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    assert [t.shape for t in seen] == [(4, 4, 9, 8)] * 2
    for handle in handles:
        handle.remove()
    with torch.no_grad():
        assert torch.equal(block(x), expected)
    assert len(seen) == 2


def test_exponential_moving_average(device):
    net, x = _net(device), _image(device)
    average = torch.optim.swa_utils.AveragedModel(
        net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5), use_buffers=True
    ).eval()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(3):
        before = copy.deepcopy(average.module)
        _gradients(net, net(x).square().mean())
        optimizer.step()
        average.update_parameters(net)
        with torch.no_grad():
            y = average(x)
            for p, old, new in zip(average.module.parameters(), before.parameters(), net.parameters(), strict=True):
                torch.testing.assert_close(p, (old + new) / 2 if _ else new)
            assert torch.equal(y, copy.deepcopy(average.module)(x))
    torch.optim.swa_utils.update_bn([x, x], average)


def test_meta_device_and_to_empty(device):
    with torch.device("meta"):
        net = _net("meta")
    assert net(torch.empty(2, 4, 9, 8, device="meta")).shape == (2, 3, 5, 4)
    net = net.to_empty(device=device)
    source = _net(device)
    net.load_state_dict(source.state_dict())
    x = _image(device)
    assert torch.equal(net(x), source(x))
    assigned = nn.Sequential(_block("meta"))
    assigned.load_state_dict(nn.Sequential(source[0]).state_dict(), assign=True)
    assert torch.equal(assigned(x), source[0](x))


# ---- modes -----------------------------------------------------------------------------------------------------------


def test_inference_mode(device):
    block, x = _block(device), _image(device)
    with torch.no_grad():
        expected = block(x)
    with torch.inference_mode():
        y, made_inside = block(x), _block(device)
        assert y.is_inference()
        assert torch.equal(y, expected)
        made_inside(x)
    with torch.no_grad():  # with gradients PyTorch refuses, whatever the op
        assert torch.equal(made_inside(x), made_inside(x.clone()))
    assert torch.equal(block(x).detach(), expected)
    block(x).sum().backward()


def test_deterministic_algorithms_raise_nothing(device):
    net, x = _net(device), _image(device).requires_grad_()
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (_gradients(net.eval(), net(x).sum()) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_grad_scaler(dtype, device):
    """One step equals that of unscaled gradients; one with an infinite gradient is left out."""
    block, x = _block(device), _image(device)
    start = copy.deepcopy(block.state_dict())
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10, growth_interval=1)
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    with torch.autocast(device.type, dtype):
        loss = block(x).float().square().mean()
    expected = torch.autograd.grad(loss, list(block.parameters()), retain_graph=True)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    for parameter, grad in zip(block.parameters(), expected, strict=True):
        assert parameter.grad.dtype == torch.float32
        torch.testing.assert_close(parameter.grad, grad, rtol=5e-2, atol=5e-3)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**11
    assert not torch.equal(block.depthwise.weight, start["depthwise.weight"])
    stepped = copy.deepcopy(block.state_dict())
    optimizer.zero_grad()
    with torch.autocast(device.type, dtype):
        loss = block(x).float().sum() * float("inf")
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**10
    assert all(torch.equal(value, stepped[name]) for name, value in block.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_input_of_a_float32_module_is_for_autocast_only(dtype, device):
    block, x = _block(device), _image(device).to(dtype)
    with pytest.raises(TypeError, match=r"torch\.autocast"):
        block(x)
    with torch.autocast(device.type, dtype):
        y = block(x)
    assert y.dtype == dtype
    y.float().sum().backward()
    assert block.pointwise.weight.grad.dtype == torch.float32
    assert block.to(dtype)(x).dtype == dtype


# ---- subclasses ------------------------------------------------------------------------------------------------------


class Scaled(DepthwiseSeparableConv2d):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, input):
        return self.scale * super().forward(input)


def test_subclass_of_the_module(device):
    module = Scaled(4, 6, 3, padding=1).to(device)
    x = _image(device)
    assert repr(module).startswith("Scaled(")
    for _ in range(3):
        with torch.no_grad():
            y = module(x)
        expected = _gradients(module, (module(x)).sum())[-1]
    assert y.shape == (4, 6, 9, 8)
    assert expected.ndim == 4
    assert set(module.state_dict()) == {"scale", "depthwise.weight", "pointwise.weight"}
    assert torch.equal(copy.deepcopy(module)(x), module(x))


class Marked(torch.Tensor):
    pass


def test_subclass_of_tensor(device):
    block, x = _block(device), _image(device)
    expected = block(x)
    for run in (lambda: block(x.as_subclass(Marked)), lambda: _stock(block, x.as_subclass(Marked))):
        y = run()
        assert type(y) is Marked
        torch.testing.assert_close(y.as_subclass(torch.Tensor), expected, rtol=1e-4, atol=1e-5)
        y.sum().backward()


# ---- processes and threads -------------------------------------------------------------------------------------------


def test_python_threads_train_at_once(device):
    nets = [_net(device).eval() for _ in range(4)]
    images = [_image(device) for _ in nets]
    expected = [_gradients(net, net(x).square().sum()) for net, x in zip(nets, images, strict=True)]
    failures = []

    def train(i):
        for _ in range(5):
            actual = _gradients(nets[i], nets[i](images[i]).square().sum())
            if not all(map(torch.equal, actual, expected[i])):
                failures.append(i)

    threads = [threading.Thread(target=train, args=(i,)) for i in range(len(nets))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


class Convolved(Dataset):
    """Items that the op has a part in, in the worker."""

    def __init__(self, block, x):
        self.block, self.x = block, x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        with torch.no_grad():
            return self.block(self.x[i])


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_of_a_data_loader(context, request):
    if context == "spawn" and request.config.getoption("--backend") == "emulated":
        pytest.skip("a new process loads the CPU kernels, whose bits are others")
    block, x = _block(c=32, c_out=32), torch.randn(3, 32, 40, 40)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)  # the parent's threads have run by the time it forks
    try:
        with torch.no_grad():
            expected = block(x)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of forking with threads
            loader = DataLoader(
                Convolved(block, x), batch_size=None, num_workers=1, multiprocessing_context=context, timeout=120
            )
            assert torch.equal(torch.stack(list(loader)), expected)
    finally:
        torch.set_num_threads(threads)


def _distributed(rank: int, file: str, state: dict, x: torch.Tensor, expected: list) -> None:
    """One of two processes; raises where the gradients are not those of the whole batch."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    try:

        def fresh():
            net = nn.Sequential(_block(), _block(c=6, c_out=3, stride=2))
            net.load_state_dict(state)
            return net

        mine = x.chunk(2)[rank]
        net = nn.parallel.DistributedDataParallel(fresh())
        for _ in range(2):
            net.zero_grad()
            net(mine).square().mean().backward()
            for parameter, grad in zip(net.parameters(), expected, strict=True):
                torch.testing.assert_close(parameter.grad, grad)
        net = fresh()
        mesh = init_device_mesh("cpu", (2,))
        for block in net:
            fully_shard(block, mesh=mesh)
        fully_shard(net, mesh=mesh)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        net(mine).square().mean().backward()
        for parameter, grad in zip(net.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad.full_tensor(), grad)
        optimizer.step()
        with torch.no_grad():
            sharded = net(mine)
            whole = fresh()
            for parameter, grad in zip(whole.parameters(), expected, strict=True):
                parameter.sub_(0.1 * grad)
            torch.testing.assert_close(sharded, whole(mine))
        dist.barrier()  # who is done first takes its connections along, which the other may still be reading
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo")
def test_distributed_data_parallel_and_fully_shard(tmp_path):
    net, x = nn.Sequential(_block(), _block(c=6, c_out=3, stride=2)), _image()
    expected = _gradients(net, net(x).square().mean())
    state = {name: value.clone() for name, value in net.state_dict().items()}
    torch.multiprocessing.spawn(_distributed, (str(tmp_path / "store"), state, x, expected), nprocs=2)
