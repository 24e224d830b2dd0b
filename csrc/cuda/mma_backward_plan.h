// What the tensor-core kernels of backward's stage P will do for a call (backward_mma.cuh): plain host C++, like
// mma_plan.h.
//
//   du              a block owns a box of pixels x `mid` mid channels. dy is read once a tile of mid channels,
//                   pw_weight and x once a box.
//   grad_pw_weight  a block owns `out` output channels x kSumMid mid channels of one split of the boxes. dy is read
//                   once a tile of mid channels; x is read, and act(z) made, once a tile of output channels.
//
// act(z) costs more than the product that it goes into, so that wide tiles of output channels save most. Each kernel
// takes the tile that is predicted to take least, of those of which two blocks share a multiprocessor where there are
// any. Where there are none, the box is made smaller until two do, unless that is predicted to be clearly slower.
#pragma once

#include "../params.h"
#include "cuda_cost.h"
#include "cuda_device.h"
#include "mma_plan.h"
#include "pixel_box.h"

namespace dsconv {

// Pixels x mid channels of a block, and mid channels of each of its 8 warps, whose pixels are 32.
struct MmaDuTile {
  int pixels, mid, warp_mid;
};

enum class MmaDuTileKind : int32_t { wide, narrow, small };
constexpr int kMmaDuTileKinds = 3;

constexpr MmaDuTile du_tile(MmaDuTileKind kind) {
  switch (kind) {
    case MmaDuTileKind::wide:
      return {128, 128, 64};
    case MmaDuTileKind::narrow:
      return {128, 64, 32};
    default:
      return {64, 64, 16};
  }
}

// act'(z) of a wide tile of floats would fill the shared memory; the small one is for floats where little is shared.
constexpr bool has_du_tile(MmaDuTileKind kind, int64_t element) {
  return kind == MmaDuTileKind::narrow || (kind == MmaDuTileKind::wide) == (element == 2);
}

// Pixels of a box, output channels of a block; output and mid channels of each of its 8 warps.
struct MmaSumTile {
  int pixels, out, warp_out, warp_mid;
};

enum class MmaSumTileKind : int32_t { wide, small, narrow };
constexpr int kMmaSumTileKinds = 3;
constexpr int kSumMid = 64;

constexpr MmaSumTile sum_tile(MmaSumTileKind kind, int64_t element) {
  const int pixels = element == 4 || kind == MmaSumTileKind::small ? 64 : 128;
  if (kind == MmaSumTileKind::narrow) return {pixels, 64, 32, 16};
  // A warp stays within one chunk of mid channels, which is 16 floats.
  return element == 4 ? MmaSumTile{pixels, 128, 64, 16} : MmaSumTile{pixels, 128, 32, 32};
}

constexpr bool has_sum_tile(MmaSumTileKind kind, int64_t element) {
  return kind != MmaSumTileKind::small || element == 2;
}

struct MmaDuShared {
  int32_t slope;          // act'(z), where act is not the identity
  int32_t grad, weights;  // two stages each, and in their place ..
  int32_t staged, taps;   // .. before the product chunks of x, x_stages of each
  int32_t slices;         // .. and behind it the results
  int32_t dy_offsets, saved_offsets, bytes;
  BoxTables tables;
};

struct MmaDuPlan {
  MmaDuTileKind kind;
  PixelBox box;
  int32_t mid_tiles, x_stages;
  MmaDuShared shared;
};

struct MmaSumShared {
  int32_t z, staged, taps, saved_offsets, bytes;  // g is at 0
  BoxTables tables;
};

struct MmaSumPlan {
  MmaSumTileKind kind;
  PixelBox box;
  int32_t out_tiles, mid_tiles, x_stages;
  int64_t splits, boxes_of_split;
  MmaSumShared shared;
};

struct MmaBackwardPlan {
  MmaDuPlan du;
  MmaSumPlan sum;  // of grad_pw_weight and grad_pw_bias
};

namespace mma_backward_detail {

// Two blocks share a multiprocessor of every architecture but the oldest.
constexpr bool two_fit(int64_t bytes, const DeviceLimits& device) {
  return 2 * (bytes + device.shared_reserved) <= device.shared_per_multiprocessor;
}

// Whether a box may take all that a block may have, or what leaves room for a second block.
enum class BoxRoom { alone, shared };

// The box of a kernel beside `products` bytes of tiles: room for a chunk of x, its table of spans (an eighth of it),
// its taps and the other tables.
inline PixelBox box_beside(const BackwardParams& p, int64_t pixels, int64_t products, BoxRoom share,
                           const DeviceLimits& device) {
  const int64_t taps = tap_count(p.geom), tap_bytes = taps <= kMostStagedTaps ? kChunkBytes * (taps + 1) : 0;
  const int64_t tables = 3 * 8 * pixels + 8 * pixels / kStripPixels + 64;
  const int64_t all =
      share == BoxRoom::alone ? device.shared_per_block : device.shared_per_multiprocessor / 2 - device.shared_reserved;
  const int64_t room = (all - products - tap_bytes - tables) * 8 / 9, most = device.shared_per_block * 2 / 5;
  return plan_box(p.geom, box_source(p), pixels, room < most ? room : most);
}

struct SharedParts {
  int64_t at = 0;
  constexpr int32_t take(int64_t bytes) {
    const int64_t begin = at;
    at += box_round_up(bytes, 16);
    return static_cast<int32_t>(begin);
  }
  constexpr void take_tables(const PixelBox& box, int64_t pixels, BoxTables& tables, int32_t& saved) {
    tables.spans = take(8 * int64_t{box.spans});
    tables.strips = take(8 * pixels / kStripPixels);
    tables.offsets = take(8 * pixels);
    saved = take(8 * pixels);
  }
};

// In multiply-adds outside of the tensor cores: of a product there, and of a value of z (see forward_cost).
constexpr double product_cost(DType dtype, const DeviceLimits& device) {
  const double rate = dtype == DType::f32 ? device.mma_tf32 : device.mma_f16;
  return rate > 0 ? device.fma_f32 / rate : 1;
}
constexpr double z_cost(const Geometry& g) { return static_cast<double>(2 * tap_count(g) + 8); }

// Bytes of dy, and of what its activation needs beside it.
constexpr int64_t gradient_bytes(const BackwardParams& p, int64_t element) {
  return output_pixels(p.geom) * p.geom.c_out * element * (p.saved != nullptr ? 2 : 1);
}

// Times that are no further apart than this do not tell two plans apart: a prediction counts whole blocks of the
// busiest multiprocessor, and leaves out much else.
constexpr double kClose = 1.15;

// Whether `a` is to be taken rather than `b`, which may not fit: two blocks a multiprocessor before one, then what is
// clearly faster, and of what is not that which asks L2 for less.
constexpr bool is_better_plan(const Prediction& a, const Prediction& b) {
  const int64_t blocks_a = smaller(a.blocks_per_multiprocessor, 2), blocks_b = smaller(b.blocks_per_multiprocessor, 2);
  if (blocks_a != blocks_b) return blocks_a > blocks_b;
  if (a.seconds * kClose < b.seconds) return true;
  return a.seconds < b.seconds * kClose && a.l2_seconds < b.l2_seconds;
}

// What is chosen where a box may take all room; or, where only one block of that fits, what is chosen for two, unless
// that is clearly slower. The prediction leaves out taps that are not staged, and what a box costs whatever its size
// (barriers, tables): of these a second block is taken to hide as much as boxes of half the pixels add.
template <typename Choose, typename Predicted>
auto for_two_blocks(const Choose& choose, const Predicted& predicted, const DeviceLimits& device) {
  const auto alone = choose(BoxRoom::alone);
  if (two_fit(alone.shared.bytes, device)) return alone;
  const auto two = choose(BoxRoom::shared);
  const auto pixels = [](const PixelBox& box) { return int64_t{box.n} * box.h * box.w; };
  const bool fits = two.box.staged && two_fit(two.shared.bytes, device) && 2 * pixels(two.box) >= pixels(alone.box);
  return fits && predicted(two).seconds <= predicted(alone).seconds * kClose ? two : alone;
}

}  // namespace mma_backward_detail

// ---------------------------------------------------------------------------------------------------------------- du

inline KernelCost du_mma_cost(const BackwardParams& p, const MmaDuPlan& plan, const DeviceLimits& device) {
  using namespace mma_backward_detail;
  const Geometry& g = p.geom;
  const int64_t element = mma_element_bytes(p.dtype), chunk = kChunkBytes / element, taps = tap_count(g);
  const MmaDuTile tile = du_tile(plan.kind);
  const bool bent = p.act != Activation::identity;
  const int64_t mid = box_round_up(g.c_mid, chunk), out_chunks = box_ceil_div(g.c_out, chunk);
  KernelCost cost;
  cost.name = "du_mma";
  cost.tile_rows = tile.pixels;
  cost.tile_columns = tile.mid;
  cost.tile_depth = chunk;
  cost.stages = 2;
  cost.blocks = plan.box.tiles * plan.mid_tiles;
  cost.threads = kBlockThreads;
  cost.bounded_blocks = 2;
  cost.shared_bytes = plan.shared.bytes;
  cost.rate = device.fma_f32;
  cost.multiply_adds =
      static_cast<double>(plan.box.tiles * tile.pixels) *
      (static_cast<double>(int64_t{plan.mid_tiles} * tile.mid * out_chunks * chunk) * product_cost(p.dtype, device) +
       (bent ? static_cast<double>(mid) * z_cost(g) : 0));
  const int64_t du = output_pixels(g) * g.c_mid * element, weights = g.c_mid * g.c_out * element;
  const int64_t x = input_pixels(g) * g.c_in * element;
  cost.dram_bytes = gradient_bytes(p, element) + weights + du + (bent ? x + g.c_mid * taps * element : 0);
  cost.l2_bytes = plan.mid_tiles * gradient_bytes(p, element) + plan.box.tiles * weights + du;
  if (bent) cost.l2_bytes += plan.box.tiles * g.c_mid * (box_elements(plan.box, g) + taps) * element;
  // Of a block: ldmatrix of every warp, and the tiles on their way in; act'(z); the results.
  const double product =
      (kWarpsOfBlock * (32 + tile.warp_mid) + tile.pixels + tile.mid) * static_cast<double>(kChunkBytes) / 128;
  cost.wavefronts =
      static_cast<double>(cost.blocks) *
      (static_cast<double>(out_chunks) * product + slice_wavefronts(p.x_layout, element, tile.pixels * tile.mid) +
       (bent ? tile.mid / static_cast<double>(chunk) * box_wavefronts(plan.box, g, p.x_layout, tile.pixels, element)
             : 0));
  return cost;
}

inline MmaDuPlan du_mma_candidate(const BackwardParams& p, MmaDuTileKind kind, mma_backward_detail::BoxRoom share,
                                  const DeviceLimits& device) {
  using namespace mma_backward_detail;
  const Geometry& g = p.geom;
  const MmaDuTile tile = du_tile(kind);
  const bool bent = p.act != Activation::identity;
  const int64_t slope = bent ? tile.pixels * tile.mid * mma_element_bytes(p.dtype) : 0;
  MmaDuPlan plan{};
  plan.kind = kind;
  plan.box = box_beside(p, tile.pixels, slope, share, device);
  plan.mid_tiles = static_cast<int32_t>(box_ceil_div(g.c_mid, tile.mid));
  MmaDuShared& s = plan.shared;
  SharedParts parts;
  s.slope = parts.take(slope);
  s.grad = s.staged = s.slices = static_cast<int32_t>(parts.at);
  SharedParts product = parts, results = parts;
  product.take(2 * tile.pixels * kChunkBytes);
  s.weights = product.take(2 * tile.mid * kChunkBytes);
  results.take(kWarpsOfBlock * slice_bytes(mma_element_bytes(p.dtype)));
  if (results.at > product.at) product.at = results.at;
  // A second chunk of x where it fits in the place of the product.
  const int64_t chunk = box_round_up(int64_t{plan.box.stage_bytes}, 16) + plan.box.tap_bytes;
  plan.x_stages = bent && parts.at + 2 * chunk <= product.at ? 2 : 1;
  parts.take(bent ? plan.x_stages * int64_t{plan.box.stage_bytes} : 0);
  s.taps = parts.take(bent ? plan.x_stages * int64_t{plan.box.tap_bytes} : 0);
  if (product.at > parts.at) parts.at = product.at;
  s.dy_offsets = parts.take(8 * tile.pixels);
  parts.take_tables(plan.box, tile.pixels, s.tables, s.saved_offsets);
  s.bytes = static_cast<int32_t>(parts.at);
  return plan;
}

inline MmaDuPlan plan_du_mma(const BackwardParams& p, const DeviceLimits& device) {
  using namespace mma_backward_detail;
  const bool floats = mma_element_bytes(p.dtype) == 4;
  const auto predicted = [&](const MmaDuPlan& plan) { return predict(du_mma_cost(p, plan, device), device); };
  const auto choose = [&](BoxRoom share) {
    const MmaDuPlan narrow = du_mma_candidate(p, MmaDuTileKind::narrow, share, device);
    if (floats && two_fit(narrow.shared.bytes, device)) return narrow;
    if (!floats && p.geom.c_mid <= du_tile(narrow.kind).mid) return narrow;
    const MmaDuPlan other = du_mma_candidate(p, floats ? MmaDuTileKind::small : MmaDuTileKind::wide, share, device);
    return is_better_plan(predicted(other), predicted(narrow)) ? other : narrow;
  };
  return for_two_blocks(choose, predicted, device);
}

// ----------------------------------------------------------------------------------------------------- grad_pw_weight

inline KernelCost sum_mma_cost(const BackwardParams& p, const MmaSumPlan& plan, const DeviceLimits& device) {
  using namespace mma_backward_detail;
  const Geometry& g = p.geom;
  const int64_t element = mma_element_bytes(p.dtype), chunk = kChunkBytes / element, taps = tap_count(g);
  const MmaSumTile tile = sum_tile(plan.kind, element);
  const bool of_weight = p.grad_pw_weight != nullptr;
  const int64_t mid_tiles = of_weight ? plan.mid_tiles : 1;
  KernelCost cost;
  cost.name = "pointwise_sum_mma";
  cost.tile_rows = tile.out;
  cost.tile_columns = kSumMid;
  cost.tile_depth = tile.pixels;
  cost.stages = plan.x_stages;
  cost.blocks = plan.splits * plan.out_tiles * mid_tiles;
  cost.threads = kBlockThreads;
  cost.bounded_blocks = 2;
  cost.shared_bytes = plan.shared.bytes;
  cost.rate = device.fma_f32;
  const int64_t partial = plan.splits * g.c_out * (of_weight ? g.c_mid : 1) * 4;
  cost.dram_bytes = gradient_bytes(p, element) + partial;
  cost.l2_bytes = mid_tiles * gradient_bytes(p, element) + partial;
  const double boxes = static_cast<double>(cost.blocks * plan.boxes_of_split);
  cost.wavefronts = boxes * tile.pixels * tile.out * static_cast<double>(element) / 128;
  if (!of_weight) return cost;
  cost.dram_bytes += (input_pixels(g) * g.c_in + g.c_mid * taps) * element;
  cost.l2_bytes +=
      plan.out_tiles * (plan.box.tiles * box_elements(plan.box, g) + plan.splits * taps) * g.c_mid * element;
  const double share = static_cast<double>(box_round_up(g.c_mid, chunk)) / static_cast<double>(mid_tiles * kSumMid);
  cost.multiply_adds = boxes * tile.pixels * kSumMid * (tile.out * product_cost(p.dtype, device) + share * z_cost(g));
  const double steps = tile.pixels * static_cast<double>(element) / 32;
  cost.wavefronts += boxes * (steps * kWarpsOfBlock * (tile.warp_out + tile.warp_mid) / 4 +
                              share * kSumMid / static_cast<double>(chunk) *
                                  box_wavefronts(plan.box, g, p.x_layout, tile.pixels, element));
  return cost;
}

// At most `waves` of blocks, two a multiprocessor; no split is without a box.
inline void split_boxes(MmaSumPlan& plan, int64_t tiles, int64_t waves, const DeviceLimits& device) {
  const int64_t most = plan.box.tiles > 0 ? plan.box.tiles : 1;
  int64_t splits = waves * 2 * device.multiprocessors / (tiles > 0 ? tiles : 1);
  splits = splits < 1 ? 1 : splits < most ? splits : most;
  plan.boxes_of_split = box_ceil_div(plan.box.tiles, splits);
  plan.splits = box_ceil_div(plan.box.tiles, plan.boxes_of_split > 0 ? plan.boxes_of_split : 1);
}

// With the kernel that adds the partial sums up, which reads them from L2.
inline Prediction predict_sums(const BackwardParams& p, const MmaSumPlan& plan, const DeviceLimits& device) {
  Prediction result = predict(sum_mma_cost(p, plan, device), device);
  const int64_t partial = plan.splits * p.geom.c_out * (p.grad_pw_weight != nullptr ? p.geom.c_mid : 1) * 4;
  result.seconds += static_cast<double>(partial) / device.l2_bandwidth;
  return result;
}

inline MmaSumPlan sum_mma_candidate(const BackwardParams& p, MmaSumTileKind kind, mma_backward_detail::BoxRoom share,
                                    const DeviceLimits& device) {
  using namespace mma_backward_detail;
  const Geometry& g = p.geom;
  const int64_t element = mma_element_bytes(p.dtype);
  const MmaSumTile tile = sum_tile(kind, element);
  MmaSumPlan plan{};
  plan.kind = kind;
  plan.box = box_beside(p, tile.pixels, tile.pixels * (tile.out + kSumMid) * element, share, device);
  plan.mid_tiles = static_cast<int32_t>(box_ceil_div(g.c_mid, kSumMid));
  plan.out_tiles = static_cast<int32_t>(box_ceil_div(g.c_out, tile.out));
  const auto shared_of = [&](int64_t x_stages) {
    MmaSumShared s{};
    SharedParts parts;
    parts.take(tile.pixels * tile.out * element);
    s.z = parts.take(tile.pixels * kSumMid * element);
    s.staged = parts.take(x_stages * plan.box.stage_bytes);
    s.taps = parts.take(x_stages * plan.box.tap_bytes);
    parts.take_tables(plan.box, tile.pixels, s.tables, s.saved_offsets);
    s.bytes = static_cast<int32_t>(parts.at);
    return s;
  };
  plan.x_stages = plan.box.staged && two_fit(shared_of(2).bytes, device) ? 2 : 1;
  plan.shared = shared_of(plan.x_stages);

  // One wave of blocks leaves fewer partial sums, two fill the device more evenly.
  const int64_t tiles = int64_t{plan.out_tiles} * (p.grad_pw_weight != nullptr ? plan.mid_tiles : 1);
  MmaSumPlan twice = plan;
  split_boxes(plan, tiles, 1, device);
  split_boxes(twice, tiles, 2, device);
  return is_better_plan(predict_sums(p, twice, device), predict_sums(p, plan, device)) ? twice : plan;
}

inline MmaSumPlan plan_sum_mma(const BackwardParams& p, const DeviceLimits& device) {
  using namespace mma_backward_detail;
  const int64_t element = mma_element_bytes(p.dtype);
  const auto predicted = [&](const MmaSumPlan& plan) { return predict_sums(p, plan, device); };
  const auto choose = [&](BoxRoom share) {
    const MmaSumPlan narrow = sum_mma_candidate(p, MmaSumTileKind::narrow, share, device);
    if (p.geom.c_out <= sum_tile(narrow.kind, element).out) return narrow;
    MmaSumPlan wide = sum_mma_candidate(p, MmaSumTileKind::wide, share, device);
    if (has_sum_tile(MmaSumTileKind::small, element) && !two_fit(wide.shared.bytes, device)) {
      const MmaSumPlan small = sum_mma_candidate(p, MmaSumTileKind::small, share, device);
      if (is_better_plan(predicted(small), predicted(wide))) wide = small;
    }
    return is_better_plan(predicted(wide), predicted(narrow)) ? wide : narrow;
  };
  return for_two_blocks(choose, predicted, device);
}

inline MmaBackwardPlan plan_mma_backward(const BackwardParams& p, const DeviceLimits& device) {
  return {plan_du_mma(p, device), plan_sum_mma(p, device)};
}

}  // namespace dsconv
