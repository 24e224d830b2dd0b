"""The memory of a CPU call beyond its outputs: at most 1 MiB of scratch for each thread, and the packed weights."""

import re
import signal
import sys
from pathlib import Path

import pytest
import torch
from fresh_process import ROOT, run, run_python

import dsconv_cuda
from bench.layers import LAYERS
from dsconv_cuda import _loader

SCRATCH = 1 << 20

# The most memory that the process had while a forward ran, above what it had before and the output. The intermediate of
# this layer would be 24 MiB; a first call of another size has loaded the code and started the threads.
MEASURE_FORWARD = """
import sys
import torch
import dsconv_cuda

def kilobytes(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name + ":"))

torch.set_num_threads(2)
memory_format = getattr(torch, sys.argv[1])
layer = dsconv_cuda.DepthwiseSeparableConv2d(32, 64, 3, padding=1, bias=True, activation="relu6")
x = torch.randn(16, 32, 112, 112).contiguous(memory_format=memory_format)
with torch.no_grad():
    layer(x[:2, :, :20].contiguous(memory_format=memory_format))
    before = kilobytes("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # VmHWM begins anew
    y = layer(x)
    print(1024 * (kilobytes("VmHWM") - before) - y.nbytes)
"""
# Vectors of channels reach past the last one: into the next pixel, but not past the end of x. Here x ends where a page
# does that may not be read.
READ_AT_A_PAGE = """
import sys
import torch
import dsconv_cuda
from dsconv_cuda import _loader

sys.path.append(sys.argv[2])
from guarded import before_a_page

def at_a_page(t, memory_format):
    return before_a_page(t.contiguous(memory_format=memory_format), alignment=1)

_loader.load_library().module.set_isa(sys.argv[1])
for dims, last in ((2, torch.channels_last), (3, torch.channels_last_3d)):
    convolve = getattr(dsconv_cuda, f"depthwise_separable_conv{dims}d")
    block = getattr(dsconv_cuda, f"DepthwiseSeparableConvBN{dims}d")
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for c, width, stride, dilation in ((5, 15, 1, 1), (19, 9, 1, 1), (54, 7, 2, 1), (33, 14, 1, 2), (17, 3, 3, 1)):
            for memory_format in (last, torch.contiguous_format):
                x = at_a_page(torch.randn(2, c, *[5] * (dims - 1), width).to(dtype), memory_format).requires_grad_()
                dw_weight = torch.randn(c, 1, *[3] * dims).to(dtype).requires_grad_()
                pw_weight = torch.randn(6, c, *[1] * dims).to(dtype).requires_grad_()
                y = convolve(x, dw_weight, pw_weight, None, None, stride, 1, dilation, activation="relu")
                grads = torch.autograd.grad(y, (x, dw_weight, pw_weight), torch.ones_like(y))
                assert all(g.isfinite().all() for g in grads)
                if dtype == torch.float32:
                    block(c, 6, 3, stride, 1, dilation=dilation)(x).sum().backward()
# More than a cache holds, in rows that lie further apart than they are long.
x = at_a_page(torch.randn(2, 48, 230, 208), torch.channels_last)[..., 8:].requires_grad_()
dsconv_cuda.DepthwiseSeparableConvBN2d(48, 6, 3, 2, 1)(x).sum().backward()
print("no fault")
"""
LIBRARY_PAGES = 2 << 20  # code and tables that the larger call touches first


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_scratch_of_a_thread_is_a_mebibyte_at_most(isa, dtype, channels_last, backward):
    module = _loader.load_library().module
    if module is None:
        pytest.skip("the kernels of this backend come without the planner's queries")
    for layer in LAYERS:
        for threads in (1, 2, 8):
            plan = module.cpu_plan(
                input=[layer.batch, layer.channels, layer.height, layer.width],
                dw_weight=[layer.middle_channels, 1, *layer.kernel],
                c_out=layer.out_channels,
                stride=[layer.stride] * 2,
                padding=[*layer.padding] * 2,
                dilation=[layer.dilation] * 2,
                dtype=dtype,
                channels_last=channels_last,
                backward=backward,
                threads=threads,
            )
            assert 0 < plan["scratch_bytes"] <= SCRATCH, (layer.name, threads)


@pytest.mark.parametrize("memory_format", ["contiguous_format", "channels_last"])
def test_a_forward_takes_no_more_than_its_output_and_its_scratch(tmp_path, memory_format):
    script = tmp_path / "measure.py"
    script.write_text(MEASURE_FORWARD)
    done = run([sys.executable, script, memory_format], package=ROOT, check=False)
    if "clear_refs" in done.stderr and "Error" in done.stderr:
        pytest.skip("this system does not measure the peak of a part of a process")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= 2 * SCRATCH + LIBRARY_PAGES


def test_memory_behind_a_guarded_tensor_may_not_be_touched():
    read = (
        "import ctypes, torch; from guarded import before_a_page; t = before_a_page(torch.ones(5));"
        "print(len(ctypes.string_at(t.data_ptr(), {})), flush=True)"
    )
    assert run_python(read.format(20), package=Path(__file__).parent).stdout == "20\n"
    beyond = run_python(read.format(20 + 16), package=Path(__file__).parent, check=False)
    assert beyond.returncode == -signal.SIGSEGV


def test_nothing_is_read_behind_the_input(isa, tmp_path):
    if _loader.load_library().module is None:
        pytest.skip("the kernels of this backend come without the switch of instruction sets")
    script = tmp_path / "read.py"
    script.write_text(READ_AT_A_PAGE)
    done = run([sys.executable, script, isa, Path(__file__).parent], package=ROOT, check=False)
    assert done.stdout.strip() == "no fault", (done.returncode, done.stderr)


def mapping_flags(address):
    """The VmFlags of the mapping that holds `address`: what was asked of its memory."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        bounds = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if bounds:
            inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    return []


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="a system without huge pages")
def test_large_tensors_ask_for_huge_pages(isa):
    """In the middle of an output and a gradient of some megabytes; their ends share pages with other memory."""
    x = torch.randn(2, 32, 224, 224, requires_grad=True)
    y = dsconv_cuda.depthwise_separable_conv2d(x, torch.randn(32, 1, 3, 3), torch.randn(32, 32, 1, 1), padding=1)
    y.backward(torch.ones_like(y))
    for tensor in (y, x.grad):
        assert "hg" in mapping_flags(tensor.data_ptr() + tensor.nbytes // 2)
