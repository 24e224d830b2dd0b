"""What only a GPU can show: capture into a CUDA graph, streams, the right device of several, and compute-sanitizer.

pytest tests --backend=cuda         where there is a GPU; elsewhere these tests are skipped
"""

import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
from shapes import Case

import dsconv_cuda

CASES = (
    Case(n=2, c=32, c_out=64, h=28, w=28),
    Case(n=1, c=24, c_out=40, h=15, w=17, kernel=(5, 5), stride=(2, 2), padding=(2, 2), out_activation="silu"),
)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LONG = 200_000_000  # cycles, a tenth of a second


@pytest.fixture
def gpu(isa, device):
    if device.type != "cuda":
        pytest.skip("needs a GPU: pytest --backend=cuda")
    return device


def forward_and_backward(tensors, kwargs, dy):
    y = dsconv_cuda.depthwise_separable_conv2d(*tensors, **kwargs)
    return (y.detach(), *torch.autograd.grad(y, tensors, dy))


def tensors_of(case, dtype, device, channels_last):
    tensors = case.tensors(dtype, device, channels_last, requires_grad=True)
    with torch.no_grad():
        dy = torch.randn_like(dsconv_cuda.depthwise_separable_conv2d(*tensors, **case.kwargs))
    return tensors, dy


def warmed_up(call):
    """As torch.cuda.graph() wants it, on a stream of its own."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    return call


@pytest.mark.one_isa
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_captured_call_gives_the_same_bits_on_other_values(gpu, case, dtype, channels_last):
    tensors, dy = tensors_of(case, dtype, gpu, channels_last)
    call = warmed_up(lambda: forward_and_backward(tensors, case.kwargs, dy))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    with torch.no_grad():
        for tensor in (*tensors, dy):
            tensor.copy_(torch.randn_like(tensor))
    graph.replay()
    torch.cuda.synchronize()
    for replayed, expected in zip(captured, call(), strict=True):
        assert torch.equal(replayed, expected)


@pytest.mark.one_isa
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_a_block_in_evaluation_is_captured(gpu, dtype):
    """Its norms fold within the graph: new statistics count at the next replay."""
    block = dsconv_cuda.DepthwiseSeparableConvBN2d(24, 40, 3, padding=1).to(gpu, dtype).eval()
    x = torch.randn(2, 24, 14, 14, device=gpu, dtype=dtype)
    for _ in range(3):
        call = warmed_up(lambda: block(x))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    block.bn1.running_var.data.mul_(3)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, block(x))


@pytest.mark.one_isa
@pytest.mark.parametrize("dtype", DTYPES)
def test_work_goes_to_the_current_stream(gpu, dtype):
    case = CASES[0]
    tensors, dy = tensors_of(case, dtype, gpu, False)
    expected = forward_and_backward(tensors, case.kwargs, dy)
    late = [tensor.detach().clone() for tensor in tensors]
    for tensor in late:
        tensor.zero_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        # The values come late, on this stream: on any other one the op would read zeros.
        torch.cuda._sleep(LONG)
        for tensor, value in zip(late, tensors, strict=True):
            tensor.copy_(value.detach())
        for tensor in late:
            tensor.requires_grad_()
        results = forward_and_backward(late, case.kwargs, dy)
    # And nothing waits for it.
    assert not stream.query()
    stream.synchronize()
    for result, value in zip(results, expected, strict=True):
        assert torch.equal(result, value)


@pytest.mark.one_isa
def test_a_call_runs_on_the_device_of_its_tensors(gpu):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    case = CASES[0]
    tensors, dy = tensors_of(case, torch.float32, torch.device("cuda", 1), False)
    assert torch.cuda.current_device() == 0
    results = forward_and_backward(tensors, case.kwargs, dy)
    assert torch.cuda.current_device() == 0
    assert all(result.device == torch.device("cuda", 1) for result in results)
    with torch.cuda.device(1):
        for result, value in zip(results, forward_and_backward(tensors, case.kwargs, dy), strict=True):
            assert torch.equal(result, value)


SANITIZED = """
    import torch
    import dsconv_cuda

    SHAPES = ((17, 33, 13, 3, 1), (32, 64, 28, 3, 2), (24, 40, 15, 5, 1), (8, 9, 9, 7, 1))
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        for channels_last in (False, True):
            for c, c_out, size, k, stride in SHAPES:
                layer = dsconv_cuda.DepthwiseSeparableConv2d(
                    c, c_out, k, stride, k // 2, bias=True, activation="relu6", out_activation="silu"
                ).to("cuda", dtype)
                x = torch.randn(2, c, size, size, device="cuda", dtype=dtype)
                if channels_last:
                    x = x.contiguous(memory_format=torch.channels_last)
                x.requires_grad_()
                layer(x).sum().backward()
    torch.cuda.synchronize()
"""


@pytest.mark.one_isa
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck", "initcheck"])
def test_compute_sanitizer_finds_nothing(gpu, tool, tmp_path):
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not on PATH (it comes with the CUDA toolkit)")
    script = tmp_path / "calls.py"
    script.write_text(textwrap.dedent(SANITIZED))
    # PyTorch's own kernels are not looked at.
    command = [sanitizer, "--tool", tool, "--error-exitcode", "1", "--kernel-regex", "kns=dsconv"]
    done = subprocess.run([*command, sys.executable, script], capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
