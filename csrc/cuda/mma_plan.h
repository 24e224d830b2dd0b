// What the tensor-core kernels will do for a call: plain host C++, like cuda_plan.h. Backward: mma_backward_plan.h.
//
// Forward: a block owns a box of pixels (pixel_box.h) and a group of output channel tiles. It computes act(z) of its
// box once, a chunk of channels at a time; where the group has more than one tile, all chunks stay in shared memory.
// Square tiles come after all of act(z): a warp has 64 x 32 of the sums, for which it loads a quarter less than for two
// times 32 x 32, but whose registers the depthwise stage needs.
#pragma once

#include "../params.h"
#include "cuda_device.h"
#include "pixel_box.h"

namespace dsconv {

// fp16 everywhere (sm_75 is the oldest there is); bf16, and float where TF32 is allowed, from sm_80 on.
constexpr bool has_tensor_cores(DType dtype, bool tf32, int64_t capability) {
  return dtype == DType::f16 || ((dtype == DType::bf16 || (dtype == DType::f32 && tf32)) && capability >= 80);
}

constexpr int kWarpsOfBlock = kBlockThreads / 32;

// pixels x channels of a block, and of each of its 8 warps.
struct MmaTile {
  int pixels, channels, warp_pixels, warp_channels;
};

enum class MmaTileKind : int32_t { wide, narrow, small, square, flat };
constexpr int kMmaTileKinds = 5;

constexpr MmaTile mma_tile(MmaTileKind kind) {
  switch (kind) {
    case MmaTileKind::wide:
      return {128, 64, 32, 32};
    case MmaTileKind::narrow:
      return {256, 32, 32, 32};
    case MmaTileKind::square:
      return {128, 128, 64, 32};
    case MmaTileKind::flat:
      return {64, 128, 32, 32};
    default:
      return {64, 64, 32, 16};
  }
}
constexpr bool makes_z_first(MmaTileKind kind) { return kind == MmaTileKind::square; }
// For what a kind that makes z first has no registers: activations that are not taken at once, and sm_75's products.
constexpr bool has_registers(const ForwardParams& p, MmaTileKind kind, int64_t capability) {
  const bool at_once = is_clamp(p.out_act) || p.out_act == Activation::leaky_relu;
  return !makes_z_first(kind) || (at_once && capability >= 80);
}

// A warp hands its results over to the stores by way of shared memory, in slices, in the type of the output.
constexpr int kSlicePixels = 32, kSliceChannels = 16;
constexpr int64_t slice_bytes(int64_t element) { return element * kSlicePixels * kSliceChannels; }

// Byte offsets into the dynamic shared memory.
struct MmaShared {
  int32_t weights, scratch, taps, bytes;  // z is at 0; scratch: staged x, then slices
  BoxTables tables;
};

struct MmaForwardPlan {
  MmaTileKind kind;
  PixelBox box;
  int32_t x_stages;                // chunks of x in shared memory, 1 or 2
  int32_t z_tiles;                 // chunks of act(z) in shared memory: one, or all
  int32_t groups, tiles_of_group;  // of output channel tiles
  int64_t blocks;                  // box.tiles * groups, groups fastest
  MmaShared shared;
};

inline MmaShared mma_forward_shared(const MmaForwardPlan& plan, int64_t element) {
  const MmaTile tile = mma_tile(plan.kind);
  const auto larger = [](int64_t a, int64_t b) { return a > b ? a : b; };
  MmaShared s{};
  int64_t at = int64_t{plan.z_tiles} * tile.pixels * kChunkBytes;
  const auto take = [&](int64_t bytes) {
    const int64_t begin = at;
    at += box_round_up(bytes, 16);
    return static_cast<int32_t>(begin);
  };
  s.weights = take(2 * tile.channels * kChunkBytes);
  s.scratch = take(larger(int64_t{plan.x_stages} * plan.box.stage_bytes, kWarpsOfBlock * slice_bytes(element)));
  s.taps = take(int64_t{plan.x_stages} * plan.box.tap_bytes);
  s.tables.spans = take(8 * int64_t{plan.box.spans});
  s.tables.strips = take(8 * tile.pixels / kStripPixels);
  s.tables.offsets = take(8 * tile.pixels);
  s.bytes = static_cast<int32_t>(at < INT32_MAX ? at : INT32_MAX);
  return s;
}

constexpr int64_t mma_element_bytes(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

template <typename Params>
BoxSource box_source(const Params& p) {
  return {p.x, p.x_strides, p.x_layout, mma_element_bytes(p.dtype), 0, true};
}

// Two blocks share a multiprocessor; a chunk of x takes less than half of what one block may have.
inline PixelBox mma_forward_box(const ForwardParams& p, MmaTileKind kind, const DeviceLimits& device) {
  return plan_box(p.geom, box_source(p), mma_tile(kind).pixels, device.shared_per_block * 2 / 5);
}

// A block takes `tiles_of_group` tiles of output channels, fewer where z of all chunks does not fit; there a kind that
// needs all of z cannot run.
inline MmaForwardPlan mma_forward_candidate(const ForwardParams& p, MmaTileKind kind, const PixelBox& box,
                                            int64_t tiles_of_group, const DeviceLimits& device) {
  const Geometry& g = p.geom;
  const int64_t element = mma_element_bytes(p.dtype);
  const MmaTile tile = mma_tile(kind);
  MmaForwardPlan plan{};
  plan.kind = kind;
  plan.box = box;
  plan.x_stages = 1;
  plan.z_tiles = 1;
  const int64_t o_tiles = box_ceil_div(g.c_out, tile.channels), chunks = box_ceil_div(g.c_mid, kChunkBytes / element);
  const int64_t half = device.shared_per_multiprocessor / 2 - 1024;
  plan.tiles_of_group = static_cast<int32_t>(tiles_of_group);
  if (plan.tiles_of_group > 1 || makes_z_first(kind)) {
    plan.z_tiles = static_cast<int32_t>(chunks < INT16_MAX ? chunks : INT16_MAX);
    if (!makes_z_first(kind) && mma_forward_shared(plan, element).bytes > device.shared_per_block) {
      plan.z_tiles = 1;
      plan.tiles_of_group = 1;
    }
  }
  plan.groups = static_cast<int32_t>(box_ceil_div(o_tiles, plan.tiles_of_group));
  plan.blocks = plan.box.tiles * plan.groups;
  if (plan.box.staged && chunks > 1) {
    plan.x_stages = 2;
    if (mma_forward_shared(plan, element).bytes > half) plan.x_stages = 1;
  }
  plan.shared = mma_forward_shared(plan, element);
  return plan;
}

// Wavefronts of shared memory of a block's depthwise stage, a chunk: what is staged, and the items' loads and stores.
inline double box_wavefronts(const PixelBox& box, const Geometry& g, Layout layout, int64_t slots, int64_t element) {
  if (!box.staged) return 0;
  const int64_t taps = g.kernel_h * g.kernel_w, used = int64_t{box.n} * box.h * box.w;
  const bool along_c = layout == Layout::nhwc, looped = box.kernel == BoxKernel::looped;
  const bool slides = (box.strips_down ? g.stride_h * g.dilation_h : g.stride_w * g.dilation_w) == 1;
  const int64_t pixels = along_c ? kPatchPixels : kStripPixels, unit = along_c ? 4 / element : 1;
  int64_t loads = 0;  // of x and of the taps, an item
  if (looped) {
    loads = taps * ((slides ? pixels / 4 : pixels) + unit);
  } else if (along_c) {
    const int64_t again = box.kernel == BoxKernel::k5s2 ? g.kernel_h - g.stride_h : 0;  // rows
    loads = (3 * g.stride_w + g.kernel_w) * (g.stride_h + g.kernel_h + again) +
            (g.kernel_h == 3 ? taps : (2 * g.kernel_h) * g.kernel_w * unit);
  } else {
    // Columns one by one, words of two, or fours, which take two wavefronts.
    const int64_t columns = g.stride_w + g.kernel_w;
    const int64_t fours = box_ceil_div(pair_start(static_cast<int>(g.kernel_w)) + columns, 4);
    const int64_t across = box.fours ? 2 * fours : box.pairs ? (columns + 2) / 2 : g.kernel_w;
    loads = (3 * g.stride_h + g.kernel_h) * across + taps;
  }
  // A warp is two patches, or 32 items of a channel each.
  const int64_t strips = slots / pixels / (box.pairs ? 2 : 1);
  const int64_t items = along_c ? box_ceil_div(used, pixels) * (kChunkBytes / 4) : strips * (kChunkBytes / element);
  return static_cast<double>(box.stage_bytes) / 128 +
         static_cast<double>(items) / 32 * static_cast<double>(g.kernel_d * loads + pixels + 4);
}

// Of results that go to slices, across their rows a word a lane, and from there to memory.
constexpr double slice_wavefronts(Layout layout, int64_t element, int64_t results) {
  const int64_t bytes = (layout == Layout::nhwc ? element : 4) + element + 1;
  return static_cast<double>(results * bytes) / 128;
}

// Of all that a block does.
inline double mma_forward_wavefronts(const ForwardParams& p, const MmaForwardPlan& plan) {
  const int64_t element = mma_element_bytes(p.dtype);
  const MmaTile tile = mma_tile(plan.kind);
  const double chunks = static_cast<double>(box_ceil_div(p.geom.c_mid, kChunkBytes / element));
  // ldmatrix of every warp, 64 bytes of k a chunk; the weights on their way in.
  const double product = kWarpsOfBlock * (tile.warp_pixels + tile.warp_channels) * kChunkBytes / 128.0;
  const double weights = tile.channels * kChunkBytes / 128.0;
  const double outputs = slice_wavefronts(p.y_layout, element, tile.pixels * tile.channels);
  return chunks * box_wavefronts(plan.box, p.geom, p.x_layout, tile.pixels, element) +
         static_cast<double>(plan.tiles_of_group) * (chunks * (product + weights) + outputs);
}

}  // namespace dsconv
