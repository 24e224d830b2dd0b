// How the passes of training through BatchNorm go over a tensor: plain host C++, like cuda_plan.h. norm_tensor.cuh,
// norm_box.cuh and norm_pixel.cuh do it.
//
//   v, a tensor, channels together    a block: `across` vectors of channels x rows of a split, a row being a pixel
//   v, a tensor, pixels together      a block: 8 channels, a warp each, x units of a split, segments of planes
//   z of a depthwise convolution      a block: a chunk of channels x the boxes of a split (pixel_box.h)
//   the same in float64               a block: a channel x a split of the pixels
//
// What a block sums goes to `partial`, one row a split; where nothing is summed a split is only what a block does.
#pragma once

#include "cuda_plan.h"

namespace dsconv {

enum class NormUse : int32_t { moments, sums, forward, backward };
constexpr bool is_sum(NormUse use) { return use == NormUse::moments || use == NormUse::sums; }

// A tensor [n, channels, d, h, w] before a norm: v, or z of the depthwise part, which is made value by value from x.
struct NormSource {
  int64_t n, channels, d, h, w;
  Layout layout;  // in which v is dense, and grad and out of a pass; of z: that of x
  const void* v;  // null: z of the following, dw_weight [channels, kernel_d, kernel_h, kernel_w], dw_bias or null
  Geometry geom;
  const void* x;
  Strides x_strides;
  const void *dw_weight, *dw_bias;
};
// Of an image, and of all.
constexpr int64_t image_pixels(const NormSource& source) { return source.d * source.h * source.w; }
constexpr int64_t source_pixels(const NormSource& source) { return source.n * image_pixels(source); }

// vectors are doubles [4][channels]: mean, invstd, gamma, beta; sums [2][channels], null for a norm of constants.
struct NormPass {
  NormSource source;
  Activation act;  // identity after z
  const void* grad;
  void* out;
  const double *vectors, *sums;
  double count;
  double* partial;  // [splits][kPartialRows][channels]
  double* result;   // [2][channels]
};

constexpr int64_t kPartialRows = 3;  // mean, sum of squares about it, values; or sum g, sum g * vhat
constexpr int64_t kMostNormSplits = 512;
constexpr int kNormSlots = 256;

struct NormPlan {
  NormUse use;
  int64_t splits, groups, blocks;  // blocks = splits * groups, groups fastest
  int64_t image;                   // pixels of an image

  // Of a tensor: elements of a vector; vectors of a row; rows or segments of planes, and elements of a segment.
  int32_t vec, across;
  int64_t units, segments, segment;

  // Of z.
  PixelBox box;
  int64_t boxes_of_split;
  Strides strides;                     // of grad and out
  int32_t staged, taps, shared_bytes;  // z is at 0
  BoxTables tables;
};

inline NormPlan plan_norm_tensor(const NormPass& pass, int64_t element, NormUse use) {
  const NormSource& source = pass.source;
  const bool rows = source.layout == Layout::nhwc;
  const int64_t plane = image_pixels(source), run = rows ? source.channels : plane;
  const int64_t wide = element == 8 ? 2 : 4;
  const auto fits = [&](const void* tensor) {
    return reinterpret_cast<uintptr_t>(tensor) % static_cast<uintptr_t>(wide * element) == 0;
  };
  NormPlan plan{};
  plan.use = use;
  plan.image = plane;
  plan.vec = run % wide == 0 && fits(source.v) && fits(pass.grad) && fits(pass.out) ? static_cast<int32_t>(wide) : 1;
  int64_t values = 0;  // of a unit
  if (rows) {
    const int64_t vectors = source.channels / plan.vec;
    plan.groups = ceil_div(vectors, kBlockThreads);
    plan.across = static_cast<int32_t>(ceil_div(vectors, plan.groups > 0 ? plan.groups : 1));
    plan.units = source.n * plane;
    values = int64_t{plan.across} * plan.vec;
  } else {
    constexpr int64_t kSegment = 1024;
    plan.groups = ceil_div(source.channels, kBlockThreads / 32);
    plan.segment = plane < kSegment ? plane : kSegment;
    plan.segments = plane > 0 ? ceil_div(plane, plan.segment) : 0;
    plan.units = source.n * plan.segments;
    values = kBlockThreads / 32 * plan.segment;
  }
  // Many values to a thread, for the constants of its channels are loaded once.
  constexpr int64_t kValues = 16 * 1024;
  const int64_t fewest = values < kValues && values > 0 ? kValues / values : 1;
  plan.splits = ceil_div(plan.units, fewest);
  if (is_sum(use) && plan.splits > kMostNormSplits) plan.splits = kMostNormSplits;
  plan.blocks = plan.splits * plan.groups;
  return plan;
}

inline NormPlan plan_norm_box(const NormPass& pass, int64_t element, NormUse use, const DeviceLimits& device) {
  const NormSource& source = pass.source;
  const Geometry& g = source.geom;
  const int64_t channels = kChunkBytes / element;
  NormPlan plan{};
  plan.use = use;
  // Room beside z and the tables for a chunk of x and its table of spans (an eighth of it).
  const int64_t z_bytes = 4 * channels * (kNormSlots + 32 / channels), taps = tap_count(g);
  const int64_t tap_bytes = taps <= kMostStagedTaps ? kChunkBytes * (taps + 1) : 0;
  const int64_t room = (device.shared_per_block - z_bytes - tap_bytes - 4 * 1024) * 8 / 9;
  const int64_t most = device.shared_per_block * 2 / 5;
  plan.box = plan_box(g, {source.x, source.x_strides, source.layout, element}, kNormSlots, room < most ? room : most);
  plan.strides = dense_strides(source.layout, g.c_mid, g.d_out, g.h_out, g.w_out);
  plan.groups = ceil_div(g.c_mid, channels);
  const int64_t wanted = ceil_div(6 * device.multiprocessors, plan.groups > 0 ? plan.groups : 1);
  int64_t splits = wanted < kMostNormSplits ? wanted : kMostNormSplits;
  if (plan.box.tiles < splits) splits = plan.box.tiles;
  plan.boxes_of_split = splits > 0 ? ceil_div(plan.box.tiles, splits) : 0;
  plan.splits = splits > 0 ? ceil_div(plan.box.tiles, plan.boxes_of_split) : 0;
  plan.blocks = plan.splits * plan.groups;
  int64_t at = 0;
  const auto take = [&](int64_t bytes) {
    const int64_t begin = at;
    at += box_round_up(bytes, 16);
    return static_cast<int32_t>(begin);
  };
  take(z_bytes);
  plan.staged = take(plan.box.stage_bytes);
  plan.taps = take(plan.box.tap_bytes);
  plan.tables.spans = take(8 * int64_t{plan.box.spans});
  plan.tables.strips = take(8 * kNormSlots / kStripPixels);
  plan.tables.offsets = take(8 * kNormSlots);
  plan.shared_bytes = static_cast<int32_t>(at);
  return plan;
}

inline NormPlan plan_norm_pixels(const NormPass& pass, NormUse use) {
  constexpr int64_t kPixels = 4096;
  NormPlan plan{};
  plan.use = use;
  plan.image = image_pixels(pass.source);
  plan.units = source_pixels(pass.source);
  plan.groups = pass.source.channels;
  plan.splits = ceil_div(plan.units, kPixels);
  if (plan.splits > kMostNormSplits) plan.splits = kMostNormSplits;
  plan.blocks = plan.splits * plan.groups;
  return plan;
}

inline NormPlan plan_norm(const NormPass& pass, DType dtype, NormUse use, const DeviceLimits& device) {
  const int64_t element = static_cast<int64_t>(element_bytes(dtype));
  if (pass.source.v != nullptr || pass.source.x == nullptr) return plan_norm_tensor(pass, element, use);
  return dtype == DType::f64 ? plan_norm_pixels(pass, use) : plan_norm_box(pass, element, use, device);
}

}  // namespace dsconv
