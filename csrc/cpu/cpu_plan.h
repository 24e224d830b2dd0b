// How one call is cut into tasks: pure functions of shape, dtype and machine. No tensors, no threads, no kernels.
//
// Order of channels inside the kernels: the c_mid channels are kept as `multiplier` planes of c_in channels, so
// k = plane * c_in + c stands for channel c * multiplier + plane, and vectors run along c of x for any multiplier.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../params.h"
#include "tile_order.h"

namespace dsconv {

constexpr int64_t kScratchBytes = int64_t{1} << 20;  // per thread, beyond packed weights
constexpr int64_t kTileBytes = 96 << 10;             // z of one tile: leaves half of a 512 KiB L2 to packed weights
constexpr int64_t kPlanesTileBytes = 256 << 10;      // the same by planes
constexpr int64_t kLeastPlaneWidth = 28;
constexpr int64_t kTurnedBytes = 192 << 10;  // x of some rows and one vector of channels, turned from nchw
constexpr int64_t kRingBytes = 384 << 10;    // the same of all channels, where the next tile reads it again
constexpr int64_t kWindowBytes = 32 << 10;   // one channel's part of x: most of an L1
constexpr int64_t kSharedCacheBytes =
    16 << 20;  // more than this a call does not find in cache from one layer to the next
// Of x, and in backward of du, more than this in the slices that a tile reads does not stay in an L2 beside the rest.
constexpr int64_t kNearSliceBytes = 512 << 10;
constexpr int64_t kCacheLine = 64;

constexpr int64_t clamp64(int64_t x, int64_t lo, int64_t hi) { return x < lo ? lo : (x > hi ? hi : x); }

// The register block of an ISA for one compute type, in elements.
struct MicroTile {
  int64_t rows, columns, lanes;
};

// Bytes of an element: of the tensors, of the compute type, and of act(z) where forward's GEMM reads it.
struct ElementBytes {
  int64_t stored, compute, middle;
};

struct CpuPlan {
  MicroTile micro;
  int64_t element;                   // bytes of the compute type
  int64_t taps;                      // kernel_d * kernel_h * kernel_w
  int64_t slice_taps;                // kernel_h * kernel_w
  int64_t slice_pixels;              // h_out * w_out
  int64_t image_pixels, pixels;      // times d_out, times n
  int64_t mid_columns, out_columns;  // c_mid and c_out rounded up to micro.columns: packed weights, partial sums
  int64_t mid_ld, out_ld;            // row strides of tiles, elements: no multiple of 128 bytes, against set conflicts
  int64_t tap_pairs;                 // forward: pairs of taps that the depthwise multiplies at a time; 0: single taps
  int64_t strip_ld;                  // row stride of the channel strips that nchw goes through
  TileOrder order;
  int64_t tiles;
  int64_t tile_pixels;           // of the largest tile
  bool by_planes;                // z is [c_mid][strip_ld] (forward_planes.inl, backward_planes.inl)
  int64_t parts;                 // forward: tasks of a tile, each a part of the output channels
  int64_t pointwise_groups;      // partial sums of the backward
  int64_t du_width;              // channels of a panel of du
  int64_t z_channels, z_ld;      // of z at a time, and their row stride
  bool joined;                   // stage D runs within the groups as far as it can
  int64_t grad_pixels;           // pixels of a tile of grad_x
  int64_t grad_rows, task_rows;  // rows of grad_x at a time, and of those that groups have not done a task
  int64_t x_ld, turned_pixels;   // of an nchw x as it is turned: elements a pixel, and pixels a task
  int64_t x_rows;                // rows of it that a group keeps, 0 where all are turned before
  // Backward by panels of channels (backward_panels.inl); panels == 0 where it goes by groups of tiles.
  int64_t panels, panel_tile;                  // panel_tile: pixels at a time, a multiple of micro.rows
  int64_t chunks, chunk_images, chunk_pixels;  // of whole images: du of a chunk stays with its task
  int64_t window;                              // elements of the windows of plane.inl, nchw
  int64_t scratch_bytes;                       // per thread
  int64_t turned;                              // elements of the windows of depthwise.inl that nchw is turned into
  int64_t ring;                                // elements that all channels of a tile's slices are turned into, or 0
  bool beyond_cache;                           // x and y, in backward x and grad_x, come from and go to DRAM
};

// What plane.inl keeps beside the strips: the window, its lists of positions and taps.
constexpr int64_t plane_bytes(const CpuPlan& plan) {
  return plan.window * plan.element + plan.window / plan.micro.lanes * 12 + plan.taps * (28 + plan.element);
}

constexpr int64_t skewed(int64_t elements, int64_t element) {
  const int64_t bytes = elements * element;
  return elements + (bytes % (2 * kCacheLine) == 0 ? kCacheLine / element : 0);
}

// Pairs of taps as pack_bf16.inl makes them: one tap and that below it, in a last single row neighbours.
constexpr int64_t tap_pairs_of(const Geometry& g) {
  return g.kernel_d * (g.kernel_h / 2 * g.kernel_w + (g.kernel_h % 2 != 0 ? ceil_div(g.kernel_w, 2) : 0));
}

// What the depthwise stage of a tile needs beside z.
constexpr int64_t depthwise_scratch(const CpuPlan& plan) {
  const int64_t strips = plan.micro.lanes * plan.strip_ld * plan.element + plane_bytes(plan);
  const int64_t turned = plan.ring > plan.turned ? plan.ring : plan.turned;
  return strips > turned * plan.element ? strips : turned * plan.element;
}

// nchw: output columns of a piece of one row that is turned into lanes of channels (depthwise.inl), 0 where a window
// for them is too large.
constexpr int64_t turned_columns_of(const Geometry& g, const CpuPlan& plan) {
  constexpr int64_t kFew = 16;
  const int64_t reach_h = (g.kernel_h - 1) * g.dilation_h + 1, reach_w = (g.kernel_w - 1) * g.dilation_w + 1;
  const int64_t rows = (reach_h < g.h_in ? reach_h : g.h_in) * g.kernel_d;
  const int64_t columns = plan.turned / (plan.micro.lanes * rows);
  if (columns >= g.w_in) return g.w_out;
  const int64_t outputs = columns < reach_w ? 0 : (columns - reach_w) / g.stride_w + 1;
  return outputs < kFew ? 0 : outputs;
}

constexpr bool forward_beyond_cache(const Geometry& g, int64_t stored) {
  return g.n * (g.c_in * g.d_in * g.h_in * g.w_in + g.c_out * g.d_out * g.h_out * g.w_out) * stored > kSharedCacheBytes;
}

// Whether forward can turn x, and so take it through a norm as it reads it.
constexpr bool turns_channels(const Geometry& g, MicroTile micro, int64_t element) {
  CpuPlan plan{};
  plan.micro = micro;
  plan.turned = kTurnedBytes / element;
  return turned_columns_of(g, plan) > 0;
}

namespace plan_detail {

inline CpuPlan base(const Geometry& g, Layout x_layout, MicroTile micro, int64_t element, int64_t middle) {
  CpuPlan plan{};
  plan.micro = micro;
  plan.element = element;
  plan.slice_taps = g.kernel_h * g.kernel_w;
  plan.taps = g.kernel_d * plan.slice_taps;
  plan.window = kWindowBytes / element;
  plan.turned = x_layout == Layout::nchw ? kTurnedBytes / element : 0;
  plan.slice_pixels = g.h_out * g.w_out;
  plan.image_pixels = g.d_out * plan.slice_pixels;
  plan.pixels = g.n * plan.image_pixels;
  plan.mid_columns = round_up(g.c_mid, micro.columns);
  plan.out_columns = round_up(g.c_out, micro.columns);
  plan.mid_ld = skewed(plan.mid_columns, middle);
  plan.out_ld = skewed(plan.out_columns, element);
  return plan;
}

// `pixels` into strips of at most max_pixels, a multiple of `granule` of them where there are enough blocks.
inline void cut_strips(CpuPlan& plan, int64_t pixels, int64_t block, int64_t max_pixels, int64_t granule) {
  TileOrder& order = plan.order;
  order.pixels = pixels;
  order.block = block;
  order.blocks = ceil_div(pixels, block);
  order.strips = clamp64(round_up(ceil_div(order.blocks, max_pixels / block), granule), 1, order.blocks);
  plan.tile_pixels = ceil_div(order.blocks, order.strips) * block;
  plan.strip_ld = skewed(round_up(plan.tile_pixels, plan.micro.lanes) + plan.micro.lanes, plan.element);
}

// Tiles in the order of the pixels, of blocks of micro.rows, or fewer if need be. In nchw, whole rows of the image:
// rows that belong together are turned with one halo.
inline void cut(CpuPlan& plan, const Geometry& g, Layout x_layout, int64_t max_pixels, int64_t granule) {
  const bool rows = x_layout == Layout::nchw && g.w_out <= max_pixels;
  int64_t block = rows ? g.w_out : clamp64(max_pixels, 1, plan.micro.rows);
  if (!rows && 2 * g.w_out <= max_pixels && 2 * g.w_out % plan.micro.rows == 0) block = 2 * g.w_out;
  cut_strips(plan, plan.pixels, block, max_pixels, granule);
  plan.order.depth = plan.order.part_depth = 1;
  plan.tiles = plan.order.strips;
}

// Strips of a slice, already cut, follow the depth.
inline void order_along_depth(CpuPlan& plan, const Geometry& g, int64_t part_depth) {
  plan.order.depth = g.d_out;
  plan.order.part_depth = part_depth;
  plan.tiles = g.n * g.d_out * plan.order.strips;
}

// Tiles along the depth, of pairs of rows where two fit.
inline void cut_along_depth(CpuPlan& plan, const Geometry& g, int64_t max_pixels, int64_t bands, int64_t part_depth) {
  cut_strips(plan, plan.slice_pixels, 2 * g.w_out <= max_pixels ? 2 * g.w_out : g.w_out, max_pixels, bands);
  order_along_depth(plan, g, part_depth);
}

// slice_bytes: of x, and in backward of du, that one slice holds.
constexpr bool gains_by_depth(const Geometry& g, int64_t slice_bytes, int64_t max_pixels) {
  return g.kernel_d > 1 && g.d_out > 1 && g.w_out <= max_pixels && g.kernel_d * slice_bytes > kNearSliceBytes;
}

// Elements of the slices that a tile along the depth reads, 0 where that is too much to keep.
inline int64_t ring_elements(const CpuPlan& plan, const Geometry& g) {
  const int64_t reach = (plan.tile_pixels / g.w_out - 1) * g.stride_h + (g.kernel_h - 1) * g.dilation_h + 1;
  const int64_t rows = reach < g.h_in ? reach : g.h_in, channels = round_up(g.c_in, plan.micro.lanes);
  const int64_t elements = g.kernel_d * channels * rows * g.w_in;
  const bool whole_rows = turned_columns_of(g, plan) == g.w_out;
  return whole_rows && g.dilation_d == 1 && elements * plan.element <= kRingBytes ? elements : 0;
}

// Of forward: columns of tiles are the tasks, four a thread.
inline int64_t part_depth_of(const CpuPlan& plan, const Geometry& g, int64_t threads) {
  const int64_t parts = clamp64(4 * threads / (g.n * plan.order.strips), 1, ceil_div(g.d_out, 2 * g.kernel_d));
  return ceil_div(g.d_out, parts);
}

inline void cut_forward(CpuPlan& plan, const Geometry& g, Layout x_layout, int64_t max_pixels, int64_t threads,
                        int64_t stored) {
  // What is turned is turned once then: 0.92 of the time where the slices are near anyway, of all channels at a time.
  const bool turns =
      x_layout == Layout::nchw && plan.slice_pixels >= 8 * plan.micro.rows && plan.mid_ld >= plan.mid_columns;
  if (!gains_by_depth(g, turns ? kNearSliceBytes : g.h_in * g.w_in * g.c_in * stored, max_pixels)) {
    return cut(plan, g, x_layout, max_pixels, plan.parts > 1 ? 1 : threads);
  }
  cut_along_depth(plan, g, max_pixels, 1, g.d_out);
  plan.order.part_depth = part_depth_of(plan, g, threads);
  if (x_layout == Layout::nchw && plan.tap_pairs == 0) plan.ring = ring_elements(plan, g);
}

inline int64_t pixels_within(int64_t bytes, int64_t bytes_per_pixel) {
  return bytes > bytes_per_pixel ? bytes / bytes_per_pixel : 1;
}

// Elements that depthwise_planes() needs beside z: a row of zeros, pointers to the rows that a tile of `rows` reads,
// and the weights of a channel.
inline int64_t planes_memory(const CpuPlan& plan, const Geometry& g, int64_t rows) {
  const int64_t in_rows = g.kernel_d * ((rows - 1) * g.stride_h + g.kernel_h);
  const int64_t pointers = ceil_div(in_rows * static_cast<int64_t>(sizeof(void*)), plan.element);
  return round_up(g.w_in, plan.micro.lanes) + pointers + plan.taps;
}

// Tiles by planes, of the rows that cost least: of whole vectors of pixels, of few rows that two tiles read, in numbers
// that are multiples of `granule`. Of z as many channels are there at a time, `products` multiply-adds follow for each.
// In 3-D a tile's rows are of one slice where tiles follow the depth.
// middle: bytes of a number of z; where these are fewer two make a pair, and two more strips are those it comes from.
inline void cut_planes(CpuPlan& plan, const Geometry& g, int64_t channels, int64_t products, int64_t granule,
                       int64_t middle) {
  constexpr int64_t kAgain = 8;  // a vector of x that is read again costs as much as so many multiply-adds
  const int64_t lanes = plan.micro.lanes, all_rows = g.n * g.d_out * g.h_out;
  const int64_t strips = middle < plan.element ? ceil_div(channels, 2) + 2 : channels;
  const int64_t most = clamp64(pixels_within(kPlanesTileBytes, strips * plan.element) / g.w_out, 1, g.h_out);
  int64_t best = 1;
  double least = 0;
  for (int64_t rows = 1; rows <= most; ++rows) {
    const int64_t tiles = ceil_div(all_rows, rows), in_rows = (rows - 1) * g.stride_h + g.kernel_h;
    const int64_t sums = round_up(rows * g.w_out, lanes) * (products + plan.taps);
    const double cost = static_cast<double>((sums + in_rows * g.w_in * kAgain) * round_up(tiles, granule));
    if (rows == 1 || cost < least) best = rows, least = cost;
  }
  const int64_t block = best * g.w_out;
  if (gains_by_depth(g, g.h_in * g.w_in * channels * plan.element, block)) {
    cut_strips(plan, plan.slice_pixels, g.w_out, block, 1);
    order_along_depth(plan, g, part_depth_of(plan, g, granule));
  } else {
    cut_strips(plan, plan.pixels, block, block, 1);
    plan.order.depth = plan.order.part_depth = 1;
    plan.tiles = plan.order.strips;
  }
  plan.by_planes = true;
  plan.parts = 1;
  plan.strip_ld = skewed(round_up(block, plan.micro.columns), plan.element);
  const int64_t sums_block = plan.micro.rows * plan.micro.columns;  // of the GEMM
  plan.scratch_bytes =
      (strips * plan.strip_ld + sums_block + planes_memory(plan, g, best)) * plan.element + 4 * kCacheLine;
}

}  // namespace plan_detail

// Parts of the output channels for the threads, where pixels are so few that blocks of micro.rows of them make unequal
// shares: each thread then makes all of z, and some panels of y.
constexpr int64_t parts_of(const Geometry& g, const CpuPlan& plan, int64_t threads) {
  const int64_t panels = plan.out_columns / plan.micro.columns, parts = threads < panels ? threads : panels;
  const int64_t z = 2 * plan.taps;  // a multiply-add of the depthwise takes about as long as two
  const int64_t by_tiles = ceil_div(ceil_div(plan.pixels, plan.micro.rows), threads) * plan.micro.rows * (g.c_out + z);
  const int64_t by_parts = plan.pixels * (ceil_div(panels, threads) * plan.micro.columns + z);
  return by_parts < by_tiles ? parts : 1;
}

// Whether nchw tensors go by planes (depthwise_planes.inl): kernels that it has code for, on maps whose rows fill
// vectors. Measured, forward in the compute type: 0.68 to 0.95 of the time of turning x; one image of 28 x 28 1.03,
// 5 x 5 of step 1 1.09, whose masks do not fit the registers. Of 16 bits, AVX-512: 0.72 to 1.
constexpr bool planes_pay(const Geometry& g, int64_t element) {
  const bool three = g.kernel_w == 3, five = g.kernel_w == 5 && g.stride_w == 2;
  const bool kernel = g.kernel_h == g.kernel_w && (three || five);
  const bool steps = g.stride_h == g.stride_w && g.stride_w <= 2 && g.dilation_h == 1 && g.dilation_w == 1;
  const bool wide = g.w_out >= kLeastPlaneWidth && (g.w_out >= 40 || g.stride_w == 2 || g.n * g.d_out > 1);
  return kernel && steps && g.multiplier == 1 && wide && g.c_mid * g.w_out * element <= kPlanesTileBytes;
}
// Forward's own, where z is pairs of bf16. In lanes of channels the depthwise can multiply pairs of taps, unless a norm
// is folded into them, which takes less up to the size where the stores of y decide: 0.95 to 1.21 of that, then 0.65 to
// 0.93; of 5 x 5 up to 1.3.
constexpr bool planes_pay_for_forward(const Geometry& g, ElementBytes bytes, bool folded) {
  if (bytes.middle == bytes.compute) return planes_pay(g, bytes.compute);
  return planes_pay(g, bytes.compute) && g.kernel_w == 3 && (folded || forward_beyond_cache(g, bytes.stored));
}
// The statistics of z, which need less of it.
constexpr bool planes_pay_for_moments(const Geometry& g, int64_t element) {
  return planes_pay(g, element) && g.kernel_w == 3 && g.w_in >= 2 * kLeastPlaneWidth;
}

// Backward (backward_planes.inl): steps of 2, where x and grad_x are four times as much to turn as z and du.
// Measured: 0.8 to 0.95 of the time; 5 x 5, whose sums do not fit the registers, took 1.2. Tensors of 16 bits, of which
// half as much moves, 0.97 to 1.1.
constexpr bool planes_pay_for_backward(const Geometry& g, ElementBytes bytes) {
  return bytes.stored == bytes.compute && planes_pay(g, bytes.compute) && g.stride_w == 2 && g.kernel_w == 3 &&
         is_flat(g);
}

// Forward: every output value is one chain of FMAs whatever its tile, so tiles may follow the number of threads.
// `whole`: all output channels of a tile in one task.
inline CpuPlan plan_forward(const Geometry& g, Layout x_layout, MicroTile micro, ElementBytes bytes, int64_t threads,
                            bool whole = false, bool by_planes = false) {
  const int64_t element = bytes.compute;
  CpuPlan plan = plan_detail::base(g, x_layout, micro, element, bytes.middle);
  plan.beyond_cache = forward_beyond_cache(g, bytes.stored);
  if (by_planes) {
    plan_detail::cut_planes(plan, g, g.c_mid, g.c_out, threads, bytes.middle);
    return plan;
  }
  const bool lanes_of_channels = x_layout == Layout::nhwc || turned_columns_of(g, plan) > 0;
  plan.tap_pairs = bytes.middle < bytes.compute && g.multiplier == 1 && lanes_of_channels ? tap_pairs_of(g) : 0;
  const int64_t mid_bytes = plan.mid_ld * bytes.middle;
  const int64_t per_pixel = mid_bytes + (micro.columns + micro.lanes) * element;
  const int64_t wanted = clamp64(plan_detail::pixels_within(kTileBytes, mid_bytes), 8 * micro.rows, 256);
  const int64_t fits = plan_detail::pixels_within(kScratchBytes - depthwise_scratch(plan) - (8 << 10), per_pixel);
  plan.parts = whole ? 1 : parts_of(g, plan, threads);
  plan_detail::cut_forward(plan, g, x_layout, wanted < fits ? wanted : fits, threads, bytes.stored);
  const int64_t tile_bytes = plan.tile_pixels * (mid_bytes + micro.columns * element) + 4 * kCacheLine;
  if (tile_bytes + depthwise_scratch(plan) > kScratchBytes) plan.ring = 0;
  plan.scratch_bytes = tile_bytes + depthwise_scratch(plan);
  return plan;
}

// Columns of the packed pointwise weights; by planes those in the compute type are read as they lie.
constexpr int64_t packed_outputs(const CpuPlan& plan, ElementBytes bytes) {
  return plan.by_planes && bytes.stored == bytes.compute ? 0 : plan.out_columns;
}

constexpr int64_t forward_tasks(const CpuPlan& plan) { return columns_of(plan.order, plan.tiles) * plan.parts; }

// The statistics of z: sums follow the tiles, as in backward. A tile is read twice more while it is near, so it is
// smaller, of few channels (mid_ld) on many pixels; but from DRAM x is read once, as it lies there. The call may go
// over several times what is planned: x is `times` as large.
inline CpuPlan plan_moments(const Geometry& g, Layout x_layout, MicroTile micro, int64_t element, int64_t tile_bytes,
                            bool by_planes = false, int64_t times = 1) {
  CpuPlan plan = plan_detail::base(g, x_layout, micro, element, element);
  if (by_planes) {
    constexpr int64_t kPanelChannels = 16;
    plan.mid_ld = g.c_mid < kPanelChannels ? g.c_mid : kPanelChannels;
    plan_detail::cut_planes(plan, g, plan.mid_ld, 0, 4, element);
    return plan;
  }
  constexpr int64_t kPanelVectors = 4;
  plan.beyond_cache = times * g.n * g.c_in * g.d_in * g.h_in * g.w_in * element > kSharedCacheBytes;
  if (plan.beyond_cache && x_layout == Layout::nhwc) {
    tile_bytes = kTileBytes;
  } else if (g.multiplier == 1 && g.c_mid > kPanelVectors * micro.lanes) {
    plan.mid_ld = kPanelVectors * micro.lanes;
  }
  const int64_t wanted = clamp64(plan_detail::pixels_within(tile_bytes, plan.mid_ld * element), 16, 256);
  const int64_t fits =
      plan_detail::pixels_within(kScratchBytes - depthwise_scratch(plan), (plan.mid_ld + micro.lanes) * element);
  plan_detail::cut_forward(plan, g, x_layout, wanted < fits ? wanted : fits, 4, element);
  const int64_t tile = plan.tile_pixels * plan.mid_ld * element + 4 * kCacheLine;
  if (tile + depthwise_scratch(plan) > kScratchBytes) plan.ring = 0;
  plan.scratch_bytes = tile + depthwise_scratch(plan);
  return plan;
}

// What stands between the stages P and D of backward: nothing, so a part of the images may go through both; sums over
// all images; or the caller.
enum class BetweenStages { nothing, sums, caller };

namespace plan_detail {

// Groups of tiles along the depth: as many as are affordable, but so that five eighths of the rows of grad_x at least
// have all of their du within one. An image's groups are bands of its rows in parts of its depth.
inline void cut_groups_along_depth(CpuPlan& plan, const Geometry& g, int64_t max_pixels, int64_t affordable) {
  const int64_t reach_h = (g.kernel_h - 1) * g.dilation_h / g.stride_h;
  const int64_t reach_d = (g.kernel_d - 1) * g.dilation_d / g.stride_d;
  int64_t groups = affordable / g.n, best_parts = 1, best = 0;
  for (; groups > 1; groups /= 2) {
    best = 0;
    for (int64_t parts = 1; parts <= groups && parts <= g.d_out; ++parts) {
      if (groups % parts != 0 || ceil_div(g.d_out, ceil_div(g.d_out, parts)) != parts) continue;
      const int64_t rows = g.h_out - (groups / parts - 1) * reach_h, slices = g.d_out - (parts - 1) * reach_d;
      const int64_t inside = rows > 0 && slices > 0 ? rows * slices : 0;
      if (inside > best) best = inside, best_parts = parts;
    }
    if (8 * best >= 5 * g.h_out * g.d_out) break;
  }
  const bool whole_images = groups <= 1;
  cut_along_depth(plan, g, max_pixels, whole_images ? 1 : groups / best_parts,
                  whole_images ? g.d_out : ceil_div(g.d_out, best_parts));
  plan.pointwise_groups = clamp64(whole_images ? affordable : g.n * groups, 1, columns_of(plan.order, plan.tiles));
}

// Rows of x, numbered through the images, from the first to the last that a tile reads. Where it goes on in the next
// image, the rest of this one's rows and those above the next one's first outputs lie between.
inline int64_t rows_read_at_most(const CpuPlan& plan, const Geometry& g) {
  const int64_t reach = (g.kernel_h - 1) * g.dilation_h + 1;
  const int64_t rows = (plan.tile_pixels - 1) / g.w_out + 2, images = (plan.tile_pixels - 1) / plan.image_pixels + 2;
  const int64_t most = (rows - 1) * g.stride_h + reach + (images - 1) * (reach + g.stride_h);
  return most < g.n * g.h_in ? most : g.n * g.h_in;
}

// By panels where they are tasks enough, all images of a chunk (all there are, for sums between the stages) have du
// within the scratch, and a panel's pass over dy
// costs less than the groups' passes over the pointwise weights: measured to be so up to some 2.5 pixels for each
// output channel. Returns the bytes of scratch, 0 where not.
inline int64_t cut_panels(CpuPlan& plan, const Geometry& g, Layout x_layout, BetweenStages between) {
  constexpr int64_t kLeastPanels = 8, kTilePixels = 256;
  const MicroTile& micro = plan.micro;
  const int64_t panels = ceil_div(g.c_mid, micro.columns);
  if (g.multiplier != 1 || panels < kLeastPanels || 2 * plan.pixels > 5 * g.c_out) return 0;
  plan.chunk_images = between == BetweenStages::sums ? g.n : clamp64(kTilePixels / plan.image_pixels, 1, g.n);
  plan.chunk_pixels = plan.chunk_images * plan.image_pixels;
  plan.chunks = ceil_div(g.n, plan.chunk_images);
  const int64_t tiles = ceil_div(plan.chunk_pixels, kTilePixels);
  plan.panel_tile = round_up(ceil_div(plan.chunk_pixels, tiles), micro.rows);
  const int64_t turned = x_layout == Layout::nchw ? plan.chunk_images * g.d_in * g.h_in * g.w_in : 0;
  const int64_t rows = 2 * g.c_out + 2 * plan.panel_tile + plan.chunk_pixels + plan.taps + 1 + turned;
  const int64_t panel = rows * micro.columns * plan.element;
  const int64_t turn = 2 * (micro.rows + 1) * plan.out_ld * plan.element;
  const int64_t bytes = (panel > turn ? panel : turn) + 8 * kCacheLine;
  if (bytes > kScratchBytes) return 0;
  plan.panels = panels;
  plan.pointwise_groups = clamp64(plan.pixels / (4 * micro.rows), 1, plan.pointwise_groups);
  return bytes;
}

}  // namespace plan_detail

// Backward: partial sums follow the tiles, so nothing here may know the number of threads.
// by_planes: where that is possible.
inline CpuPlan plan_backward(const Geometry& g, Layout x_layout, MicroTile micro, int64_t element,
                             BetweenStages between = BetweenStages::nothing, bool by_planes = false) {
  constexpr int64_t kMaxGroups = 16;
  constexpr int64_t kPartialBytes = int64_t{32} << 20, kPanelsAtOnce = 6;
  CpuPlan plan = plan_detail::base(g, x_layout, micro, element, element);
  plan.grad_pixels = 256;
  plan.grad_rows = 4;
  plan.x_ld = skewed(round_up(g.c_in, micro.lanes), element);
  plan.turned_pixels = 512;
  if (x_layout == Layout::nchw) {
    plan.grad_pixels = clamp64(g.w_in, 512, 2048);
    plan.grad_rows = clamp64(plan.grad_pixels / g.w_in, 1, g.h_in);
  }
  int64_t fixed = plan.grad_pixels * micro.columns * element + 8 * kCacheLine;
  const int64_t panels = plan.mid_columns / micro.columns;
  plan.z_channels = ceil_div(panels, ceil_div(panels, kPanelsAtOnce)) * micro.columns;
  plan.z_ld = skewed(plan.z_channels, element);
  constexpr int64_t kMostPixels = 256;
  int64_t per_pixel = (2 * plan.z_ld + micro.columns + 2 * plan.out_ld) * element;
  if (by_planes) {
    // Strips of a length rounded up and skewed.
    const int64_t rows = plan_detail::planes_memory(plan, g, kMostPixels / g.w_out + 1);
    fixed += (plan.z_channels * 4 * micro.lanes + rows) * element + kCacheLine;
    per_pixel += plan.z_channels * element;
  }
  const int64_t fits = plan_detail::pixels_within(kScratchBytes - fixed, per_pixel);
  const int64_t max_pixels = fits < kMostPixels ? fits : kMostPixels;
  const int64_t partial_bytes = (g.c_out + plan.taps) * plan.mid_columns * element;
  const int64_t affordable = clamp64(kPartialBytes / partial_bytes, 2, kMaxGroups);
  // x and du of a slice, and half of them for the rest.
  const int64_t slice_bytes = (g.h_in * g.w_in * g.c_in + plan.slice_pixels * plan.mid_columns) * element;
  const bool along_depth = plan_detail::gains_by_depth(g, slice_bytes / 2, max_pixels);
  if (along_depth) {
    plan_detail::cut_groups_along_depth(plan, g, max_pixels, affordable);
  } else {
    plan_detail::cut(plan, g, x_layout, max_pixels, 4);
    plan.pointwise_groups = clamp64(plan.tiles / 2, 1, affordable);
    if (plan.tiles > 1 && plan.pointwise_groups == 1) plan.pointwise_groups = 2;
  }

  plan.beyond_cache = 2 * g.n * g.c_in * g.d_in * g.h_in * g.w_in * element > kSharedCacheBytes;
  plan.du_width = g.multiplier == 1 ? micro.columns : g.c_mid;
  const int64_t group_rows = g.n * g.d_out * g.h_out / plan.pointwise_groups;
  // Rows of du that a row of grad_x reads; in 3-D whole slices (backward_groups.inl).
  int64_t reach = (g.kernel_h - 1) * g.dilation_h / g.stride_h;
  if (has_depth(g)) reach = ((g.kernel_d - 1) * g.dilation_d / g.stride_d + 1) * g.h_out;
  plan.task_rows = along_depth ? g.h_in : plan.grad_rows;
  // Else no row of grad_x lies in a group.
  plan.joined = along_depth || group_rows > reach;
  const int64_t panels_bytes =
      between != BetweenStages::caller ? plan_detail::cut_panels(plan, g, x_layout, between) : 0;
  plan.by_planes = by_planes && plan.joined && plan.panels == 0 && plan.order.block % g.w_out == 0;
  if (plan.by_planes) {
    plan.du_width = 1;
    plan.grad_rows = g.h_in;
  } else if (x_layout == Layout::nchw && !has_depth(g) && plan.joined && plan.panels == 0) {
    const int64_t rows = plan_detail::rows_read_at_most(plan, g);
    if (2 * plan.pointwise_groups * rows <= g.n * g.h_in) plan.x_rows = rows;
  }
  plan.scratch_bytes = panels_bytes > 0 ? panels_bytes : fixed + plan.tile_pixels * per_pixel;
  return plan;
}

// Backward by planes: elements of the strips of a tile's z, and of the memory of depthwise_planes().
inline int64_t strips_elements(const CpuPlan& plan, const Geometry& g) {
  const int64_t memory = plan_detail::planes_memory(plan, g, plan.tile_pixels / g.w_out);
  return round_up(plan.z_channels * plan.strip_ld + memory, kCacheLine / plan.element);
}

// Elements of a group's partial sums of the depthwise weight gradient.
constexpr int64_t depthwise_sums(const CpuPlan& plan, const Geometry& g) {
  const int64_t vectors = plan.by_planes ? g.c_mid : g.multiplier * ceil_div(g.c_in, plan.micro.lanes);
  return vectors * plan.micro.lanes * plan.taps;
}

// The range of outputs o in [0, extent) that tap `offset` (tap * dilation - pad) reads inside [0, in).
constexpr Range valid_outputs(int64_t offset, int64_t stride, int64_t in, int64_t extent) {
  const int64_t begin = offset >= 0 ? 0 : ceil_div(-offset, stride);
  const int64_t end = in > offset ? ceil_div(in - offset, stride) : 0;
  const int64_t top = end < extent ? end : extent;
  return {begin < top ? begin : top, top};
}
// The range of taps t in [0, count) for which position + t * dilation falls inside [0, in).
constexpr Range valid_taps(int64_t position, int64_t dilation, int64_t in, int64_t count) {
  return valid_outputs(position, dilation, in, count);
}

}  // namespace dsconv
