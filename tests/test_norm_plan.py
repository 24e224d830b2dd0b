"""The planner of the CUDA passes of training through BatchNorm, plain host C++: every value in exactly one part."""

import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[1] / "csrc"

PLANNER = r"""
#include <cstdio>
#include <initializer_list>

#include "cuda/cuda_norm.h"
using namespace dsconv;

static int failures = 0;
#define CHECK(condition) \
  do { \
    if (!(condition)) ++failures, std::printf("line %d: %s\n", __LINE__, #condition); \
  } while (false)

alignas(64) static char memory[64];
constexpr int64_t kConstants = 6;  // of a channel, norm_channel.cuh

static void check_tensor(int64_t n, int64_t channels, int64_t depth, int64_t size, Layout layout, DType dtype,
                         NormUse use) {
  NormPass pass{};
  const int64_t image = depth * size * size;
  pass.source.n = n, pass.source.channels = channels, pass.source.d = depth, pass.source.h = pass.source.w = size;
  pass.source.layout = layout;
  pass.source.v = memory;
  const NormPlan plan = plan_norm(pass, dtype, use, kGpus[4].limits);
  const int64_t run = layout == Layout::nhwc ? channels : image;
  CHECK(plan.image == image);
  CHECK(plan.vec >= 1 && run % plan.vec == 0 && plan.blocks == plan.splits * plan.groups);
  CHECK(plan.splits <= plan.units && (!is_sum(use) || plan.splits <= kMostNormSplits));
  if (layout == Layout::nhwc) {
    CHECK(plan.across <= kBlockThreads && plan.across * plan.groups * plan.vec >= channels);
    CHECK(plan.units == n * image);
    const int64_t accumulator = static_cast<int64_t>(accumulator_bytes(dtype));
    CHECK(kConstants * plan.across * plan.vec * accumulator <= 24 * 1024);
  } else {
    CHECK(plan.groups * (kBlockThreads / 32) >= channels && plan.segments * plan.segment >= image);
    CHECK(plan.units == n * plan.segments && (plan.segments - 1) * plan.segment < image);
    CHECK(plan.segment % plan.vec == 0);
  }
  pass.source.v = memory + element_bytes(dtype);  // not aligned
  CHECK(plan_norm(pass, dtype, use, kGpus[4].limits).vec == 1);
}

static void check_z(int64_t n, int64_t channels, int64_t depth, int64_t size, int64_t kernel, Layout layout,
                    DType dtype, const DeviceLimits& device) {
  NormPass pass{};
  NormSource& source = pass.source;
  Geometry& g = source.geom;
  g.n = n, g.c_in = g.c_mid = channels, g.multiplier = 1;
  g.d_in = g.d_out = depth;
  g.kernel_d = depth > 1 ? 3 : 1, g.pad_front = g.kernel_d / 2;
  g.stride_d = g.dilation_d = 1;
  g.h_in = g.h_out = g.w_in = g.w_out = size;
  g.kernel_h = g.kernel_w = kernel;
  g.stride_h = g.stride_w = g.dilation_h = g.dilation_w = 1;
  g.pad_top = g.pad_left = kernel / 2;
  source.n = n, source.channels = channels, source.d = depth, source.h = source.w = size;
  source.layout = layout;
  source.x = memory;
  source.x_strides = dense_strides(layout, channels, depth, size, size);
  const NormPlan plan = plan_norm(pass, dtype, NormUse::moments, device);
  CHECK(plan.vec == 0 && plan.splits <= kMostNormSplits && plan.blocks == plan.splits * plan.groups);
  if (dtype == DType::f64) {
    CHECK(plan.units == n * depth * size * size && plan.groups == channels);
    return;
  }
  const PixelBox& box = plan.box;
  CHECK(plan.shared_bytes <= device.shared_per_block && plan.shared_bytes >= 8 * 3 * kBlockThreads);
  CHECK(box.n * box.h * box.w <= kNormSlots && box.tiles_h * box.h >= size && box.tiles_w * box.w >= size);
  CHECK(plan.splits * plan.boxes_of_split >= box.tiles && (plan.splits - 1) * plan.boxes_of_split < box.tiles);
  CHECK(plan.groups * (kChunkBytes / static_cast<int64_t>(element_bytes(dtype))) >= channels);
  CHECK(plan.strides.d == dense_strides(layout, channels, depth, size, size).d);
  CHECK(box.n * box.tiles / (box.tiles_h * box.tiles_w) >= n * depth);
  CHECK(box.staged || kernel > (depth > 1 ? 3 : 5));
}

int main() {
  for (const DType dtype : {DType::f32, DType::f64, DType::f16, DType::bf16})
    for (const Layout layout : {Layout::nchw, Layout::nhwc})
      for (const int64_t n : {1, 128})
        for (const int64_t channels : {1, 3, 144, 2052})
          for (const int64_t size : {1, 7, 14, 112})
            for (const int64_t depth : {1, 5}) {
              for (const NormUse use : {NormUse::moments, NormUse::sums, NormUse::forward, NormUse::backward})
                check_tensor(n, channels, depth, size, layout, dtype, use);
              for (const int64_t kernel : {1, 3, 5, 11, 31})
                for (const Gpu& gpu : kGpus) check_z(n, channels, depth, size, kernel, layout, dtype, gpu.limits);
            }
  CHECK(parts_splits(1) == 1 && parts_splits(1000) == 8 && parts_splits(1 << 20) == kMostNormSplits);
  return failures != 0;
}
"""


def test_every_value_is_in_one_part_and_shared_memory_holds_a_block(tmp_path):
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    source, program = tmp_path / "planner.cpp", tmp_path / "planner"
    source.write_text(PLANNER)
    subprocess.run([compiler, "-std=c++20", "-O1", "-Wall", f"-I{CSRC}", source, "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[:4000]
