"""Instruction sets of the CPU kernels: which one runs, that none leaks, and the same bits for any number of threads."""

import re
import shutil
import subprocess

import pytest
import torch
from fresh_process import ROOT, run_python

import dsconv_cuda
from dsconv_cuda import _loader


@pytest.fixture(scope="module")
def library_path():
    done = run_python("import dsconv_cuda._loader as l; print(l.load_library().path)", DSCONV_CPU_ISA=None)
    return done.stdout.split()[-1]


@pytest.fixture(scope="module")
def available():
    code = "import dsconv_cuda._loader as l; print(*l.load_library().module.isa_available())"
    return run_python(code, DSCONV_CPU_ISA=None).stdout.splitlines()[-1].split()


def active(requested):
    code = "import dsconv_cuda._loader as l; print(l.load_library().module.isa_active())"
    return run_python(code, DSCONV_CPU_ISA=requested).stdout.split()[-1]


def test_the_best_available_is_active_by_default(available):
    assert available[0] == "generic"
    assert active(None) == available[-1]
    assert active("") == available[-1]


def test_the_variable_lowers_the_choice(available):
    for name in available:
        assert active(name) == name


@pytest.mark.parametrize("requested", ["sse9", "AVX2", "avx512"])
def test_what_the_machine_lacks_raises_at_first_use_and_lists_what_there_is(available, requested):
    if requested in available:
        pytest.skip(f"this machine has {requested}")
    code = """
import torch, dsconv_cuda  # neither import may fail
try:
    dsconv_cuda.depthwise_separable_conv2d(torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3, 3), torch.ones(1, 1))
except RuntimeError as error:
    print("raised:", error)
"""
    out = run_python(code, DSCONV_CPU_ISA=requested).stdout
    assert "raised:" in out
    for part in ("DSCONV_CPU_ISA", f"'{requested}'", "available: " + ", ".join(available)):
        assert part in out


@pytest.fixture
def library(isa):
    """The library with the AVX-512 kernels active; what is set there is set back."""
    if isa != "avx512":
        pytest.skip("only AVX-512 has half vectors")
    library = _loader.load_library().module
    by_halves = library.multiplies_by_halves()
    yield library
    library.set_multiplies_by_halves(by_halves)


# Panels of 32, 16 and 8 channels, and what is left behind them: 8 is half a vector of floats, 4 of doubles.
@pytest.mark.one_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("c", "c_out"), [(24, 24), (8, 7), (72, 40), (3, 4), (37, 52), (300, 20)])
def test_half_vectors_of_their_own_give_the_bits_of_those_that_are_shared(library, c, c_out, dtype):
    x = torch.randn(2, c, 9, 11, dtype=dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    weights = [torch.randn(shape, dtype=dtype).requires_grad_() for shape in ((c, 1, 3, 3), (c_out, c, 1, 1))]
    dy = torch.randn(2, c_out, 9, 11, dtype=dtype).contiguous(memory_format=torch.channels_last)

    def step():
        y = dsconv_cuda.depthwise_separable_conv2d(x, *weights, padding=1, activation="relu6")
        return y.detach(), *torch.autograd.grad(y, (x, *weights), dy)

    library.set_multiplies_by_halves(False)
    shared = step()
    library.set_multiplies_by_halves(True)
    for ours, theirs in zip(step(), shared, strict=True):
        assert torch.equal(ours, theirs)


def functions_with(disassembly, registers):
    """Names of the functions whose code names one of `registers`, demangled."""
    found, name = set(), None
    for line in disassembly:
        header = re.match(r"[0-9a-f]+ <(.*)>:$", line)
        if header:
            name = header[1]
        elif registers.search(line):
            found.add(name)
    return found


def test_no_wide_registers_outside_the_isa_namespaces(library_path):
    objdump = shutil.which("objdump")
    if objdump is None:
        pytest.skip("no objdump")
    command = [objdump, "-d", "-C", "--no-show-raw-insn", library_path]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    wide = functions_with(lines, re.compile(r"%[yz]mm\d"))
    assert len(wide) > 50, "the library has no symbols, or no vector kernels"
    outside = {name for name in wide if not re.search(r"\bdsconv::avx(2|512|512_bf16)::", name)}
    assert not outside
    widest = functions_with(lines, re.compile(r"%zmm\d"))
    assert {name for name in widest if not re.search(r"\bdsconv::avx512(_bf16)?::", name)} == set()


# n, c_in, multiplier, c_out, h, w, kernel, stride, activation, out_activation
SHAPES = [
    (1, 37, 1, 19, 23, 17, 3, 1, 1, 0),
    (3, 16, 2, 33, 9, 31, 5, 2, 4, 2),
    (2, 113, 1, 64, 14, 14, 3, 1, 5, 5),
    (1, 3, 1, 5, 40, 50, 7, 3, 0, 0),
    (5, 64, 1, 64, 28, 28, 3, 1, 2, 2),
    (11, 250, 1, 220, 7, 7, 3, 1, 4, 2),
    (1, 300, 1, 250, 7, 7, 3, 1, 2, 2),  # so few pixels that two and three threads share the output channels out
]


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_the_same_bits_for_any_number_of_threads_and_every_run(shape, dtype, channels_last):
    from dsconv_cuda._loader import load_library

    load_library()
    ops = torch.ops.dsconv_cuda
    n, c, multiplier, c_out, h, w, k, stride, act, out_act = shape
    generator = torch.Generator().manual_seed(0)

    def random(*size):
        return torch.randn(size, generator=generator).to(dtype)

    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x = random(n, c, h, w).contiguous(memory_format=memory_format)
    weights = [random(c * multiplier, 1, k, k), random(c_out, c * multiplier, 1, 1)]
    biases = [random(c * multiplier), random(c_out)]
    geometry = ([stride] * 2, [k // 2] * 4, [1, 1], act, out_act)

    def everything():
        y, pre = ops.fwd_with_pre(x, *weights, *biases, *geometry)
        saved = None if out_act == 0 else (y if out_act <= 3 else pre)
        return y, pre, *ops.bwd(torch.cos(y), x, *weights, biases[0], saved, *geometry, 31)

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = everything()
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            for _ in range(2):
                for got, want in zip(everything(), expected, strict=True):
                    assert torch.equal(got, want)
    finally:
        torch.set_num_threads(threads)


PLANNER = r"""
#include <algorithm>
#include <cstdio>
#include <initializer_list>
#include <vector>
#include "cpu/cpu_plan.h"
using namespace dsconv;

// Every pixel in exactly one tile, no tile above tile_pixels or outside its column, columns enough for the groups,
// scratch within its bound.
static int check(const Geometry& g, MicroTile micro, ElementBytes bytes, const CpuPlan& plan) {
  const TileOrder& order = plan.order;
  const int64_t columns = columns_of(order, plan.tiles);
  bool ok = first_tile(order, 0) == 0 && first_tile(order, columns) == plan.tiles;
  int64_t covered = 0;
  std::vector<Range> tiles;
  for (int64_t tile = 0; ok && tile < plan.tiles; ++tile) {
    const Range pixels = tile_range(order, tile);
    ok = pixels.begin < pixels.end && pixels.end - pixels.begin <= plan.tile_pixels;
    if (!walks_depth(order)) {
      ok = ok && pixels.begin == covered;
      covered = pixels.end;
      continue;
    }
    tiles.push_back(pixels);
    for (const int64_t pixel : {pixels.begin, pixels.end - 1}) {
      const int64_t column = column_of(order, pixel);
      ok = ok && first_tile(order, column) <= tile && tile < first_tile(order, column + 1);
    }
  }
  const auto before = [](const Range& a, const Range& b) { return a.begin < b.begin; };
  std::sort(tiles.begin(), tiles.end(), before);
  for (const Range& pixels : tiles) {
    ok = ok && pixels.begin == covered;
    covered = pixels.end;
  }
  ok = ok && covered == plan.pixels;
  if (walks_depth(order)) ok = ok && pixels_of_tiles(order, 0, plan.tiles) == plan.pixels;
  ok = ok && plan.pointwise_groups <= columns;
  if (g.c_mid <= 8192 && g.c_out <= 8192 && plan.taps <= 1024) ok = ok && plan.scratch_bytes <= kScratchBytes;
  if (!ok) {
    std::printf("n %ld c_mid %ld c_out %ld h %ld w %ld rows %ld middle %ld: tiles %ld scratch %ld\n", (long)g.n,
                (long)g.c_mid, (long)g.c_out, (long)g.h_out, (long)g.w_out, (long)micro.rows, (long)bytes.middle,
                (long)plan.tiles, (long)plan.scratch_bytes);
  }
  return ok ? 0 : 1;
}

int main() {
  int bad = 0;
  int64_t back_by_planes = 0;
  struct Form {
    MicroTile micro;
    ElementBytes bytes;
  };
  constexpr ElementBytes f32 = {4, 4, 4}, f64 = {8, 8, 8}, f16 = {2, 4, 4}, bf16_dot = {2, 4, 2};
  const Form forms[] = {{{4, 8, 4}, f32},    {{4, 4, 2}, f64},    {{6, 16, 8}, f16},     {{6, 8, 4}, f64},
                        {{14, 32, 16}, f32}, {{14, 16, 8}, f64}, {{14, 32, 16}, bf16_dot}};
  const int64_t channels[] = {1, 3, 17, 32, 113, 512, 728, 2048, 8192, 100000};
  for (const auto& [micro, bytes] : forms)
    for (const int64_t c_mid : channels)
      for (const int64_t c_out : channels)
        for (const int64_t n : {1, 2, 16})
          for (const int64_t size : {1, 2, 7, 14, 28, 56, 112, 300})
            for (const int64_t kernel : {1, 3, 31}) {
              Geometry g{};
              g.n = n;
              g.c_in = g.c_mid = c_mid;
              g.multiplier = 1;
              g.c_out = c_out;
              g.h_in = g.h_out = g.w_in = g.w_out = size;
              g.kernel_h = g.kernel_w = kernel;
              g.stride_h = g.stride_w = g.dilation_h = g.dilation_w = 1;
              g.pad_top = g.pad_left = kernel / 2;
              g.d_in = g.d_out = g.kernel_d = g.stride_d = g.dilation_d = 1;
              for (const Layout layout : {Layout::nchw, Layout::nhwc}) {
                for (const int64_t threads : {1, 2, 7}) {
                  bad += check(g, micro, bytes, plan_forward(g, layout, micro, bytes, threads));
                  if (layout == Layout::nhwc || !planes_pay(g, bytes.compute)) continue;
                  bad += check(g, micro, bytes, plan_forward(g, layout, micro, bytes, threads, false, true));
                }
                if (layout == Layout::nchw && planes_pay(g, bytes.compute)) {
                  bad += check(g, micro, bytes, plan_moments(g, layout, micro, bytes.compute, 48 << 10, true));
                }
                bad += check(g, micro, bytes, plan_backward(g, layout, micro, bytes.compute));
                if (layout == Layout::nhwc) continue;
                Geometry half = g;
                half.h_out = half.w_out = (size - 1) / 2 + 1;
                half.stride_h = half.stride_w = 2;
                if (!planes_pay_for_backward(half, bytes)) continue;
                const CpuPlan plan =
                    plan_backward(half, layout, micro, bytes.compute, BetweenStages::nothing, true);
                bad += check(half, micro, bytes, plan);
                back_by_planes += plan.by_planes;
              }
            }
  int64_t along_depth = 0, rings = 0, planes_along_depth = 0;
  for (const auto& [micro, bytes] : forms)
    for (const int64_t c_mid : {3, 54, 113, 728, 8192})
      for (const int64_t n : {1, 3, 20})
        for (const int64_t depth : {1, 2, 9})
          for (const int64_t height : {1, 28, 57})
            for (const int64_t width : {9, 56, 300})
              for (const int64_t kernel : {1, 3}) {
                Geometry g{};
                g.n = n;
                g.c_in = g.c_mid = c_mid;
                g.multiplier = 1;
                g.c_out = 24;
                g.d_in = g.d_out = depth;
                g.h_in = g.h_out = height;
                g.w_in = g.w_out = width;
                g.kernel_d = g.kernel_h = g.kernel_w = kernel;
                g.stride_d = g.stride_h = g.stride_w = g.dilation_d = g.dilation_h = g.dilation_w = 1;
                g.pad_front = g.pad_top = g.pad_left = kernel / 2;
                for (const Layout layout : {Layout::nchw, Layout::nhwc}) {
                  for (const int64_t threads : {1, 7}) {
                    const CpuPlan plan = plan_forward(g, layout, micro, bytes, threads);
                    bad += check(g, micro, bytes, plan);
                    rings += plan.ring > 0;
                    if (layout == Layout::nhwc || !planes_pay(g, bytes.compute)) continue;
                    const CpuPlan planes = plan_forward(g, layout, micro, bytes, threads, false, true);
                    bad += check(g, micro, bytes, planes);
                    planes_along_depth += walks_depth(planes.order);
                    bad += check(g, micro, bytes, plan_moments(g, layout, micro, bytes.compute, 48 << 10, true));
                  }
                  bad += check(g, micro, bytes, plan_moments(g, layout, micro, bytes.compute, 64 << 10));
                  const CpuPlan backward = plan_backward(g, layout, micro, bytes.compute);
                  bad += check(g, micro, bytes, backward);
                  along_depth += walks_depth(backward.order);
                }
              }
  return bad != 0 || along_depth == 0 || rings == 0 || planes_along_depth == 0 || back_by_planes == 0;
}
"""


def test_the_planner_cuts_whole_and_stays_within_its_scratch(tmp_path):
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    source, program = tmp_path / "planner.cpp", tmp_path / "planner"
    source.write_text(PLANNER)
    subprocess.run(
        [compiler, "-std=c++20", "-O1", f"-I{ROOT / 'csrc'}", str(source), "-o", str(program)], check=True, text=True
    )
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[:4000]
