"""SyncBatchNorm in the block: processes with a part of the batch each get what one with the whole batch gets."""

import socket
import sys

import pytest
import torch
from fresh_process import ROOT, run
from torch import nn

from dsconv_cuda import DepthwiseSeparableConvBN2d

# Rank 0 holds the first images, rank 1 the rest; the last case leaves rank 1 without any.
PROCESS = """
import os, sys
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from dsconv_cuda import DepthwiseSeparableConvBN2d, DepthwiseSeparableSequence, fuse

PARTS = ((3, 2), (1, 4), (5, 0))


def make(dtype, blocks=1):
    torch.manual_seed(0)
    block = DepthwiseSeparableConvBN2d(6, 9, 3, 2, 1, bias=True, activation="silu", out_activation="relu", dtype=dtype)
    if blocks == 2:
        block = DepthwiseSeparableSequence(block, DepthwiseSeparableConvBN2d(9, 9, 3, padding=1, dtype=dtype))
    with torch.no_grad():
        for norm in (m for m in block.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.weight.uniform_(0.5, 2)
            norm.bias.normal_()
    x = torch.randn(5, 6, 11, 7, dtype=dtype)
    return block, x, torch.randn(5, 9, 6, 4, dtype=dtype)


def step(module, x, dy):
    x = x.detach().requires_grad_()
    out = module(x)
    (out * dy).sum().backward()
    return out.detach(), x.grad


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def work(rank, port):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    for parts in PARTS:
        for form, blocks in (("plain", 1), ("frozen", 1), ("recomputed", 1), ("plain", 2), ("without bn1", 2)):
            block, x, dy = make(torch.float64, blocks)
            alone, _, _ = make(torch.float64, blocks)
            for module in (block, alone):
                if form == "frozen":
                    module.bn1.eval()
                if form == "recomputed":
                    module.recompute_output = True
                if form == "without bn1":
                    module[1].bn1 = nn.Identity()
            out, grad = step(alone, x, dy)
            block = nn.SyncBatchNorm.convert_sync_batchnorm(block)
            converted = sum(type(m) is nn.SyncBatchNorm for m in block.modules())
            assert converted == 2 * blocks - (form == "without bn1")
            mine = slice(0, parts[0]) if rank == 0 else slice(parts[0], 5)
            my_out, my_grad = step(block, x[mine], dy[mine])
            close(my_out, out[mine])
            close(my_grad, grad[mine])
            for p, q in zip(block.parameters(), alone.parameters()):
                dist.all_reduce(p.grad)
                close(p.grad, q.grad)
            for b, c in zip(block.buffers(), alone.buffers()):
                close(b, c)
    # DDP takes no SyncBatchNorm on the CPU. What is converted behind its back it trains: gradients are averaged.
    mine = slice(0, 2) if rank == 0 else slice(2, 5)
    for blocks in (1, 2):
        block, x, dy = make(torch.float64, blocks)
        try:
            nn.parallel.DistributedDataParallel(nn.SyncBatchNorm.convert_sync_batchnorm(make(torch.float64)[0]))
            raise AssertionError("DDP takes SyncBatchNorm on the CPU now: say so in the README")
        except ValueError as error:
            assert "SyncBatchNorm layers only work with GPU modules" in str(error)
        model = nn.parallel.DistributedDataParallel(block)
        nn.SyncBatchNorm.convert_sync_batchnorm(model.module)
        assert any(type(m) is nn.SyncBatchNorm for m in model.modules())
        alone = make(torch.float64, blocks)[0]
        optimizers = [torch.optim.SGD(m.parameters(), 0.1, momentum=0.9) for m in (model, alone)]
        for _ in range(3):
            for optimizer in optimizers:
                optimizer.zero_grad()
            out, _ = step(model, x[mine], 2 * dy[mine])
            expected, _ = step(alone, x, dy)
            close(out, expected[mine])
            for p, q in zip(model.parameters(), alone.parameters()):
                close(p.grad, q.grad)
            for optimizer in optimizers:
                optimizer.step()
        for b, c in zip(model.buffers(), alone.buffers()):
            close(b, c)
    # fuse(), with a norm before the depthwise convolution.
    for parts in PARTS:
        mine = slice(0, parts[0]) if rank == 0 else slice(parts[0], None)
        sides = []
        for form in (nn.SyncBatchNorm.convert_sync_batchnorm, lambda model: model):
            torch.manual_seed(0)
            layers = (
                nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 8, 3, 2, 1, groups=8),
                nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 9, 1), nn.BatchNorm2d(9),
            )
            sides.append(fuse(form(nn.Sequential(*layers).double()), inplace=True))
        x, dy = torch.randn(5, 6, 11, 7, dtype=torch.float64), torch.randn(5, 9, 6, 4, dtype=torch.float64)
        (out, grad_x), (expected, expected_grad_x) = step(sides[0], x[mine], dy[mine]), step(sides[1], x, dy)
        close(out, expected[mine])
        close(grad_x, expected_grad_x[mine])
        for p, q in zip(sides[0].parameters(), sides[1].parameters()):
            grad = p.grad if p.grad is not None else torch.zeros_like(p)
            dist.all_reduce(grad)
            close(grad, q.grad)
        for b, c in zip(sides[0].buffers(), sides[1].buffers()):
            close(b, c)
        assert all(type(m).__name__.startswith(("Deferred", "Fused", "Absorbed")) for m in list(sides[0])[1:])
    # With the norms as they are: statistics of each process's own.
    mine = slice(0, 2) if rank == 0 else slice(2, 4)
    block, x, dy = make(torch.float64)
    model = nn.parallel.DistributedDataParallel(block)
    out, _ = step(model, x[mine], dy[mine])
    alone = [make(torch.float64)[0] for _ in range(2)]
    outs = [step(b, x[i : i + 2], dy[i : i + 2])[0] for b, i in zip(alone, (0, 2))]
    close(out, outs[rank])
    for p, q, r in zip(block.parameters(), *(b.parameters() for b in alone)):
        close(p.grad, (q.grad + r.grad) / 2)
    dist.destroy_process_group()
    os.write(1, f"rank {rank} agrees\\n".encode())  # in one piece: the other process writes too


if __name__ == "__main__":
    mp.spawn(work, (sys.argv[1],), nprocs=2)
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.skipif("config.getoption('--backend') != 'cpu'", reason="new processes load the built library")
def test_two_processes_equal_one_with_the_joined_batch(tmp_path):

    script = tmp_path / "two_processes.py"
    script.write_text(PROCESS)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])

    done = run([sys.executable, script, port], package=ROOT, cwd=tmp_path)
    assert "rank 0 agrees" in done.stdout
    assert "rank 1 agrees" in done.stdout


@pytest.mark.usefixtures("isa")
@pytest.mark.one_isa
def test_without_a_process_group_it_is_batch_norm(device):
    block = DepthwiseSeparableConvBN2d(4, 6, 3, padding=1).to(device)
    x = torch.randn(2, 4, 5, 5, device=device)
    expected = block(x)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(block)
    converted.bn1.reset_running_stats()
    converted.bn2.reset_running_stats()
    assert torch.equal(converted(x), expected)
    assert torch.equal(converted.eval()(x).isnan().any(), torch.tensor(False, device=device))
