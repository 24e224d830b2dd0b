// What a product of matrices by the library behind torch is assumed to cost, for the forms that are split around one.
//
// Not in float: whether the library may round to TF32 is a switch of PyTorch's own that a binary for every torch cannot
// set, and that need not be what the op was told. Nor with more taps than are staged: these come through L1, which no
// prediction counts, and the depthwise kernel alone asks for more of them than a fused one (replknet_k31 in NCHW: 1.7
// times as many sectors).
#pragma once

#include "cuda_plan.h"

namespace dsconv {

constexpr bool has_library_product(const Geometry& g, DType dtype, const DeviceLimits& device) {
  if (tap_count(g) > kMostStagedTaps) return false;
  return dtype == DType::f64 || (dtype != DType::f32 && has_tensor_cores(dtype, false, device.capability));
}

// `count` products of [rows, depth] and [depth, columns].
struct LibraryProduct {
  const char* name;
  int64_t count, rows, columns, depth;
  bool splits_depth = false;  // into partial sums in float, where it has few tiles
};

// Assumed: one of these tiles, the best, each operand read from L2 once a tile of the other.
constexpr ForwardTile kLibraryTiles[] = {{256, 128}, {128, 256}, {128, 128}, {128, 64}, {64, 64}};

// What crosses to memory is the caller's to add: it knows what L2 keeps.
inline KernelCost library_product_cost(const LibraryProduct& p, DType dtype, const DeviceLimits& device) {
  const int64_t bytes = static_cast<int64_t>(element_bytes(dtype));
  const int64_t step = dtype == DType::f64 ? 16 : 32;
  KernelCost best;
  Prediction least{};
  for (const ForwardTile tile : kLibraryTiles) {
    for (int64_t pieces = 1; pieces <= (p.splits_depth ? 16 : 1); pieces *= 2) {
      const int64_t rows = p.count * ceil_div(p.rows, tile.pixels), columns = ceil_div(p.columns, tile.channels);
      KernelCost cost;
      cost.name = p.name;
      cost.tile_rows = tile.pixels;
      cost.tile_columns = tile.channels;
      cost.tile_depth = step;
      cost.stages = dtype == DType::f64 ? 2 : 3;
      cost.blocks = rows * columns * pieces;
      cost.threads = kBlockThreads;
      cost.bounded_blocks = 2;
      cost.shared_bytes = cost.stages * step * (tile.pixels + tile.channels) * bytes;
      cost.multiply_adds = static_cast<double>(rows * columns * tile.pixels * tile.channels) *
                           static_cast<double>(ceil_div(p.depth, step) * step);
      cost.rate = dtype == DType::f64 ? device.fma_f64 : device.mma_f16;
      const int64_t outputs = p.count * p.rows * p.columns;
      cost.l2_bytes = (columns * p.count * p.rows * p.depth + rows * p.columns * p.depth + outputs) * bytes;
      if (pieces > 1) cost.l2_bytes += 2 * pieces * outputs * static_cast<int64_t>(accumulator_bytes(dtype));
      const Prediction found = predict(cost, device);
      if (found.blocks_per_multiprocessor > 0 && (best.blocks == 0 || is_better(found, least))) {
        best = cost;
        least = found;
      }
    }
  }
  return best;
}

}  // namespace dsconv
