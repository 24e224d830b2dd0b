// Boxes of output pixels, and the part of x that a box reads, staged in shared memory a chunk of channels at a time:
// the planning of it, plain host C++. box_input.cuh does it.
//
//   a box: n slices x h rows x w columns                 what it reads of x, the halo once:
//
//          w                                                in_w = (w - 1) * stride_w + (kernel_w - 1) * dilation_w + 1
//      +-------+                                          +---------------+
//    h | slots |   numbered slice, row, column            |               |  in_h likewise; zeros where it leaves the
//      +-------+   w fastest                              |               |  image
//                                                         +---------------+
//
// In 2-D a slice is an image. In 3-D each slice of outputs has kernel_d planes of x staged, one behind the other.
//
// A chunk is kChunkBytes of channels. In shared memory x lies as in global memory, with pitches of its own: channels of
// a pixel together (nhwc), or columns of a row together (nchw); there the staged columns start at a multiple of the
// copied piece, so that source and target have the same alignment.
//
// Where rows are so short or so unaligned that a piece is four bytes or less (nchw, boxes of whole rows, 2-D), the rows
// of a channel and image, adjacent in memory, come 16 bytes at a time as one run, and go from there to their places.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>

#include "../params.h"

namespace dsconv {

constexpr int kBlockThreads = 256;
constexpr int kChunkBytes = 64;
constexpr int kStripPixels = 4;  // x unit-strided along w: of one item of the depthwise stage, down a column or a row
constexpr int kPatchPixels = 8;  // x unit-strided along c: of one item, 2 rows x 4 columns or (flat) 1 x 8
constexpr int kMostStagedTaps = 128;

// How the taps of a strip are read and summed: unrolled for square kernels at dilation 1 (extent, stride), in loops, or
// from global memory.
enum class BoxKernel : int32_t { unstaged, looped, k3s1, k3s2, k5s1, k5s2 };

struct PixelBox {
  BoxKernel kernel;
  int32_t n, h, w;   // n * h * w slots; pixels beyond the slice are slots that nobody stores
  bool strips_down;  // nchw: a strip is kStripPixels rows of a column (h a multiple), else columns
  bool pairs;        // nchw: items are two strips side by side, loaded by words of two columns (w is even)
  bool fours;        // of pairs: loaded by fours of columns, which begin at a multiple of 8 bytes (pair_start())
  bool flat;         // nhwc: patches of one row (w a multiple of 8), else h is even and w a multiple of 4
  int64_t tiles_h, tiles_w, tiles;  // boxes, columns of boxes fastest

  bool staged;                                                  // else taps are read from global memory
  int32_t in_h, in_w;                                           // rows, columns staged, a plane
  int32_t copy_bytes;                                           // of one copy; the size of an element: one by one
  int32_t column_pitch, row_pitch, plane_pitch, channel_pitch;  // bytes
  int32_t spans;                                                // pixels (nhwc) or pieces of rows (nchw) staged
  int32_t stage_bytes;                                          // of one chunk of x, runs behind what is read
  int32_t run_bytes;  // of a channel's rows of an image as they are in memory, with their alignment; 0: no runs
  int32_t runs_at;    // byte in the staged chunk: [image][channel] runs
  int32_t tap_bytes;  // of one chunk of dw_weight and dw_bias; 0: not staged
};

constexpr int64_t box_ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t box_round_up(int64_t a, int64_t b) { return box_ceil_div(a, b) * b; }

// Where a box's tables are in the dynamic shared memory, in bytes.
struct BoxTables {
  int32_t spans, strips, offsets;
};

// What the planner has to know of x.
struct BoxSource {
  const void* x;
  Strides strides;
  Layout layout;
  int64_t element;       // bytes
  int64_t channels = 0;  // of a chunk, nchw; 0: kChunkBytes of them
  bool pairs = false;    // whether the kernel takes pairs of strips where it can: box_input.cuh, compute()
};

// The widest piece, at most 16 bytes, that source and target can be copied by.
inline int32_t box_copy_bytes(const Geometry& g, const BoxSource& s) {
  if (s.layout == Layout::nhwc && g.multiplier != 1) return static_cast<int32_t>(s.element);
  const auto aligned = [&](int64_t bytes) {
    const auto multiple = [&](int64_t extent, int64_t stride) {
      return extent == 1 || stride * s.element % bytes == 0;
    };
    return reinterpret_cast<uintptr_t>(s.x) % static_cast<uintptr_t>(bytes) == 0 && multiple(g.n, s.strides.n) &&
           multiple(g.d_in, s.strides.d) && multiple(g.h_in, s.strides.h) &&
           (s.layout == Layout::nhwc ? multiple(g.w_in, s.strides.w) : multiple(g.c_in, s.strides.c));
  };
  for (const int64_t bytes : {16, 8, 4}) {
    if (bytes > s.element && aligned(bytes)) return static_cast<int32_t>(bytes);
  }
  return static_cast<int32_t>(s.element);
}

// Whether rows follow each other without a gap, and every image begins at a multiple of 16 bytes.
inline bool has_runs(const Geometry& g, const BoxSource& s) {
  return reinterpret_cast<uintptr_t>(s.x) % 16 == 0 && g.d_in == 1 && g.d_out == 1 && g.multiplier == 1 &&
         (g.n == 1 || s.strides.n * s.element % 16 == 0) && (g.h_in == 1 || s.strides.h == g.w_in);
}

// Fills in what follows from n, h, w, strips_down and flat, rows row_pad bytes further apart (nchw); `staged` stays
// false where 32 bits do not hold a box's offsets.
inline void finish_box(PixelBox& box, const Geometry& g, const BoxSource& s, int32_t copy_bytes, int64_t most_bytes,
                       int64_t row_pad = 0) {
  box.tiles_h = box_ceil_div(g.h_out, box.h);
  box.tiles_w = box_ceil_div(g.w_out, box.w);
  box.tiles = box_ceil_div(output_slices(g), box.n) * box.tiles_h * box.tiles_w;
  const int64_t in_h = (box.h - 1) * g.stride_h + (g.kernel_h - 1) * g.dilation_h + 1;
  int64_t in_w = (box.w - 1) * g.stride_w + (g.kernel_w - 1) * g.dilation_w + 1;
  const int64_t planes = box.n * g.kernel_d;
  int64_t column = kChunkBytes, row = 0, channel = s.element, spans = 0, bytes = 0, run = 0, runs_at = 0;
  if (s.layout == Layout::nhwc) {
    row = in_w * kChunkBytes;
    // Neighbouring half warps read two output rows further on: from the other half of the banks.
    while (row < 4 * most_bytes && g.stride_h % 4 != 0 && 2 * g.stride_h * row % 128 != 64) row += 16;
    spans = planes * in_h * in_w;
    bytes = planes * in_h * row;
  } else {
    column = s.element;
    const int64_t piece = copy_bytes / s.element;
    in_w = box_round_up(in_w + piece - 1, piece);
    row = in_w * s.element + row_pad;
    channel = box_round_up(planes * in_h * row, 16);
    spans = planes * in_h * (in_w / piece);
    const int64_t channels = s.channels > 0 ? s.channels : kChunkBytes / s.element;
    bytes = runs_at = channel * channels;
    if (copy_bytes <= 4 && box.tiles_w == 1 && has_runs(g, s)) {
      const int64_t rows = in_h < g.h_in ? in_h : g.h_in;
      run = box_round_up(rows * g.w_in * s.element, 16) + 16;
      bytes += box.n * channels * run;
    }
  }
  constexpr int64_t kLimit = int64_t{1} << 31;
  const auto reach = [](int64_t extent, int64_t stride) { return (extent - 1) * stride; };
  const int64_t images = box_ceil_div(box.n - 1, g.d_out) + 1;  // that the box has slices of, at most
  const bool offsets_fit = reach(images, s.strides.n) + reach(g.d_in, s.strides.d) + reach(g.h_in, s.strides.h) +
                               reach(g.w_in, s.strides.w) <
                           kLimit;
  box.staged = offsets_fit && bytes <= most_bytes && spans * 8 <= most_bytes;
  const int64_t taps = tap_count(g);
  box.tap_bytes = box.staged && taps <= kMostStagedTaps ? static_cast<int32_t>(kChunkBytes * (taps + 1)) : 0;
  box.kernel = box.staged ? BoxKernel::looped : BoxKernel::unstaged;
  if (!box.staged) return;
  // Along channels the unrolled kernels take the taps of neighbouring channels to lie together, as they are staged.
  const bool known_direction = s.layout == Layout::nhwc ? !box.flat && box.tap_bytes > 0 : box.strips_down;
  if (known_direction && g.kernel_h == g.kernel_w && g.stride_h == g.stride_w && g.dilation_h == 1 &&
      g.dilation_w == 1) {
    if (g.kernel_h == 3 && g.stride_h == 1) box.kernel = BoxKernel::k3s1;
    if (g.kernel_h == 3 && g.stride_h == 2) box.kernel = BoxKernel::k3s2;
    if (g.kernel_h == 5 && g.stride_h == 1) box.kernel = BoxKernel::k5s1;
    if (g.kernel_h == 5 && g.stride_h == 2) box.kernel = BoxKernel::k5s2;
  }
  box.copy_bytes = copy_bytes;
  box.in_h = static_cast<int32_t>(in_h);
  box.in_w = static_cast<int32_t>(in_w);
  box.column_pitch = static_cast<int32_t>(column);
  box.row_pitch = static_cast<int32_t>(row);
  box.plane_pitch = static_cast<int32_t>(in_h * row);
  box.channel_pitch = static_cast<int32_t>(channel);
  box.spans = static_cast<int32_t>(spans);
  box.stage_bytes = static_cast<int32_t>(box_round_up(bytes, 16));
  box.run_bytes = static_cast<int32_t>(run);
  box.runs_at = static_cast<int32_t>(runs_at);
}

// Where the first two warps' items of an nchw box begin, down its columns: a channel has so many strips, or half as
// many pairs, that whole warps, or a part of one, are its. Warps of strips that are not used are left out.
struct StripStarts {
  struct Start {
    int64_t channel, slice, row, column;  // row and column of x, from the box's first
  } of[64];
  int count[2] = {};  // of each warp

  StripStarts(const PixelBox& box, const Geometry& g, int64_t strips) {
    const int64_t height = box.h / kStripPixels, used = box.n * height * box.w, together = box.pairs ? 2 : 1;
    for (int64_t lane = 0; lane < 64; ++lane) {
      const int64_t channel = lane * together / strips, strip = lane * together - channel * strips;
      if (strip >= used) continue;
      const int64_t line = strip / box.w, column = strip - line * box.w, slice = line / height;
      const int64_t row = (line - slice * height) * kStripPixels;
      const int64_t warp = lane / 32;
      of[32 * warp + count[warp]++] = {channel, slice * g.kernel_d, row * g.stride_h, column * g.stride_w};
    }
  }
};

// Wavefronts of shared memory that these take for a value each, for a word, or for a four: those of half a warp.
inline int64_t strip_wavefronts(const PixelBox& box, const StripStarts& starts, int64_t element) {
  const int64_t unit = box.fours ? 8 : 4, lanes = 128 / unit;
  int64_t wavefronts = 0;
  for (int64_t first = 0; first < 64; first += lanes) {
    const int64_t warp = first / 32;
    for (int64_t shift = 0; shift < 4; shift += box.pairs ? 4 : element) {
      int64_t words[32][32], in_bank[32] = {}, most = 0;  // the different words of each bank
      for (int64_t i = first % 32; i < starts.count[warp] && i < first % 32 + lanes; ++i) {
        const StripStarts::Start& at = starts.of[32 * warp + i];
        const int64_t byte = at.channel * box.channel_pitch + at.slice * box.plane_pitch + at.row * box.row_pitch +
                             at.column * element + shift;
        const int64_t word = byte / unit, bank = word % lanes;
        bool found = false;
        for (int64_t other = 0; other < in_bank[bank] && !found; ++other) found = words[bank][other] == word;
        if (found) continue;
        words[bank][in_bank[bank]++] = word;
        if (in_bank[bank] > most) most = in_bank[bank];
      }
      wavefronts += most;
    }
  }
  return wavefronts;
}

// Two columns of an unrolled kernel; every row starts at a whole word.
inline bool takes_pairs(const PixelBox& box, const BoxSource& s) {
  const bool unrolled = box.kernel != BoxKernel::unstaged && box.kernel != BoxKernel::looped;
  return s.pairs && s.layout == Layout::nchw && s.element == 2 && box.strips_down && unrolled && box.w % 2 == 0 &&
         box.row_pitch % 4 == 0;
}

// The place of a pair's first column in its four, where the padding is half the kernel.
constexpr int pair_start(int kernel) { return (4 - kernel / 2 % 4) % 4; }

// At stride 2, where the words of neighbouring pairs are in every other bank, and their fours neighbours.
inline bool takes_fours(const PixelBox& box, const Geometry& g) {
  const bool starts_there = (g.pad_left + pair_start(static_cast<int>(g.kernel_w))) % 4 == 0;
  return box.pairs && g.stride_w == 2 && starts_there && box.copy_bytes >= 8 && box.row_pitch % 8 == 0;
}

// Puts the rows of an nchw box so far apart that its strips are in different banks, as far as that can be.
inline void spread_rows(PixelBox& box, const Geometry& g, const BoxSource& s, int64_t slots, int64_t most_bytes) {
  if (!box.staged || !box.strips_down) return;
  box.pairs = takes_pairs(box, s);
  box.fours = takes_fours(box, g);
  const StripStarts starts(box, g, slots / kStripPixels);
  PixelBox padded = box;
  int64_t least = strip_wavefronts(box, starts, s.element);
  const int64_t conflict_free = box.fours ? 4 : box.pairs ? 2 : 2 * 4 / s.element;
  for (int64_t pad = box.copy_bytes; pad < 64 && least > conflict_free; pad += box.copy_bytes) {
    finish_box(padded, g, s, box.copy_bytes, most_bytes, pad);
    if (!padded.staged) return;
    if (box.pairs && padded.row_pitch % 4 != 0) continue;
    if (takes_fours(padded, g) != box.fours) continue;
    const int64_t found = strip_wavefronts(padded, starts, s.element);
    if (found >= least) continue;
    least = found;
    box = padded;
  }
}

// Elements of one channel of x that a box reads: its rows and the halo around them, inside the image; each plane as
// often as it is staged.
constexpr int64_t box_elements(const PixelBox& box, const Geometry& g) {
  const auto reach = [](int64_t outputs, int64_t kernel, int64_t stride, int64_t dilation, int64_t in) {
    const int64_t wanted = (outputs - 1) * stride + (kernel - 1) * dilation + 1;
    return wanted < in ? wanted : in;
  };
  return box.n * (g.kernel_d < g.d_in ? g.kernel_d : g.d_in) *
         reach(box.h, g.kernel_h, g.stride_h, g.dilation_h, g.h_in) *
         reach(box.w, g.kernel_w, g.stride_w, g.dilation_w, g.w_in);
}

// The box of at most `slots` pixels (a multiple of 16) that reads and computes least in total; not staged where none
// needs at most most_bytes for a chunk of x.
inline PixelBox plan_box(const Geometry& g, const BoxSource& s, int64_t slots, int64_t most_bytes) {
  const int32_t copy_bytes = box_copy_bytes(g, s);
  const auto smaller = [](int64_t a, int64_t b) { return a < b ? a : b; };
  PixelBox best{};
  double best_cost = 0;
  const auto consider = [&](int64_t h, int64_t w, bool down, bool flat) {
    PixelBox box{};
    box.h = static_cast<int32_t>(h);
    box.w = static_cast<int32_t>(w);
    box.strips_down = down;
    box.flat = flat;
    const bool whole = h >= g.h_out && w >= g.w_out;
    const int64_t most = smaller(output_slices(g) > 0 ? output_slices(g) : 1, slots / (h * w));
    for (int64_t n = whole ? most : 1; n > 0; n = n / 2) {
      box.n = static_cast<int32_t>(n);
      finish_box(box, g, s, copy_bytes, most_bytes);
      // Bytes of x from global memory, rows in whole sectors, and as much again for the arithmetic of every slot.
      const int64_t rows = smaller((h - 1) * g.stride_h + (g.kernel_h - 1) * g.dilation_h + 1, g.h_in);
      const int64_t columns = smaller((w - 1) * g.stride_w + (g.kernel_w - 1) * g.dilation_w + 1, g.w_in);
      const bool broken_rows = s.layout == Layout::nchw && columns < g.w_in;
      const double row_bytes = static_cast<double>(columns * s.element + (broken_rows ? 32 : 0));
      const double cost = static_cast<double>(box.tiles) *
                          (static_cast<double>(n * rows) * row_bytes + static_cast<double>(slots * s.element));
      const bool better = best.n == 0 || (box.staged != best.staged ? box.staged : cost < best_cost);
      if (better) {
        best = box;
        best_cost = cost;
      }
      if (box.staged) break;
    }
  };
  // Whole rows first, then halves, thirds ..; as many rows as there is room for, spread evenly.
  const bool down = s.layout == Layout::nchw && g.h_out >= kStripPixels;
  const bool flat = s.layout == Layout::nhwc && g.h_out == 1;
  const int64_t columns_step = down ? 1 : flat ? kPatchPixels : 4;
  const int64_t rows_step = down ? kStripPixels : s.layout == Layout::nhwc && !flat ? 2 : 1;
  int64_t last_w = 0;
  for (int64_t parts = 1; parts <= g.w_out; ++parts) {
    const int64_t w = box_round_up(box_ceil_div(g.w_out, parts), columns_step);
    if (w * rows_step > slots || w == last_w) continue;
    last_w = w;
    for (int64_t room = slots / w / rows_step * rows_step; room >= rows_step; room = room / 2 / rows_step * rows_step) {
      const int64_t most = smaller(room, box_round_up(g.h_out, rows_step));
      const int64_t h = box_round_up(box_ceil_div(g.h_out, box_ceil_div(g.h_out, most)), rows_step);
      consider(h, w, down, flat);
      if (best.staged) break;
    }
    if (parts >= 16 && best.n != 0 && (best.staged || w <= columns_step)) break;
  }
  spread_rows(best, g, s, slots, most_bytes);
  return best;
}

}  // namespace dsconv
