// Moments of y for the norm after it (ForwardParams::y_parts), from the accumulators of a forward's block: mean and sum
// of squares about it of each channel over the block's pixels. cuda_norm_parts.cu merges them.
//
// A thread takes its own pixels, what owns the same channels is added by shuffles (a warp of the tensor-core kernel) or
// in shared memory, and the block's parts merge there: two passes, the mean and then the squares about it, and no
// division but by the number of all.
#pragma once

#include "dtype.cuh"
#include "fragments.cuh"
#include "gemm.cuh"
#include "pixel.cuh"

namespace dsconv {

template <typename Acc>
struct OutputPart {
  Acc mean, squares;
};

// Of `number` parts, load(i) of count(i) pixels.
template <typename Acc, typename Load, typename Count>
DSCONV_DEVICE OutputPart<Acc> merged_parts(int number, const Load& load, const Count& count) {
  Acc pixels = 0;
  OutputPart<Acc> result = {0, 0};
#pragma unroll 1
  for (int i = 0; i < number; ++i) {
    pixels += count(i);
    result.mean += count(i) * load(i).mean;
  }
  result.mean /= pixels;
#pragma unroll 1
  for (int i = 0; i < number; ++i) {
    const OutputPart<Acc> part = load(i);
    const Acc d = part.mean - result.mean;
    result.squares += part.squares + count(i) * (d * d);
  }
  return result;
}

// Where tile `tile` of `tiles` puts channel o.
template <typename Acc>
DSCONV_DEVICE void write_part(void* parts, int64_t tile, int64_t channels, int64_t o, const OutputPart<Acc>& part) {
  Acc* to = static_cast<Acc*>(parts) + tile * 2 * channels + o;
  to[0] = part.mean;
  to[channels] = part.squares;
}
template <typename Acc>
DSCONV_DEVICE void write_part_pixels(void* parts, int64_t tile, int64_t tiles, int64_t channels, Acc pixels) {
  static_cast<Acc*>(parts)[tiles * 2 * channels + tile] = pixels;
}

// ------------------------------------------------------------------------------------------------------- tensor cores

// The parts of a warp's tile: of its channels, and how many pixels they are of.
template <int kChannels>
struct WarpParts {
  OutputPart<float> of[kChannels];
  float pixels;
};

// slots: offsets of the warp's pixels, -1 where there is none. The caller puts the barriers.
template <typename Warp>
DSCONV_DEVICE void put_warp_parts(const Warp& warp, SlotOffsets slots, WarpParts<Warp::kN>& to) {
  constexpr int kRows = Warp::kM / 8;  // of a lane
  const int lane = thread_here() % 32, g = lane / 4, t = lane % 4;
  const auto over_rows = [](float value) {
#pragma unroll
    for (int distance = 4; distance < 32; distance *= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
    return value;
  };
  unsigned there = 0;  // a bit a row
  float pixels = 0;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const bool exists = slots[8 * r + g] >= 0;
    there |= exists ? 1u << r : 0u;
    pixels += exists ? 1.0f : 0.0f;
  }
  pixels = over_rows(pixels);
  const float each = pixels > 0 ? 1 / pixels : 0;
#pragma unroll
  for (int j = 0; j < Warp::kN / 8; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float sum = 0, squares = 0;
#pragma unroll
      for (int r = 0; r < kRows; ++r) sum += (there >> r & 1) != 0 ? warp.acc[r / 2][j][2 * (r % 2) + e] : 0.0f;
      const float mean = over_rows(sum) * each;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float d = (there >> r & 1) != 0 ? warp.acc[r / 2][j][2 * (r % 2) + e] - mean : 0.0f;
        squares += d * d;
      }
      squares = over_rows(squares);
      if (g == 0) to.of[8 * j + 2 * t + e] = {mean, squares};
    }
  }
  if (lane == 0) to.pixels = pixels;
}

// ---------------------------------------------------------------------------------------------------------------- FMA

// Of a block of forward.cuh: tile `tile` of `tiles`, channels o0 .. ; bias [c_out] or null. scratch: an OutputPart a
// thread, of which nobody is reading.
template <typename Gemm, typename T, typename Acc>
DSCONV_DEVICE void put_block_parts(const Gemm& own, const typename Gemm::Registers& acc, const T* bias, int64_t pixels,
                                   int64_t channels, int64_t tile, int64_t tiles, int32_t o0, void* parts,
                                   OutputPart<Acc>* scratch) {
  const int64_t left = pixels - tile * Gemm::kM;
  const auto count = [&](int lane) -> Acc {
    const int64_t pixels_left = left - lane * kThreadM;
    return static_cast<Acc>(pixels_left <= 0 ? 0 : pixels_left < kThreadM ? pixels_left : kThreadM);
  };
  const int lane = own.m / kThreadM, thread = static_cast<int>(threadIdx.x);
  const Acc mine = count(lane), each = mine > 0 ? 1 / mine : 0;
#pragma unroll
  for (int j = 0; j < Gemm::kThreadN; ++j) {
    OutputPart<Acc> part = {0, 0};
#pragma unroll
    for (int i = 0; i < kThreadM; ++i) part.mean += Acc(i) < mine ? acc[i][j] : Acc(0);
    part.mean *= each;
#pragma unroll
    for (int i = 0; i < kThreadM; ++i) {
      const Acc d = Acc(i) < mine ? acc[i][j] - part.mean : Acc(0);
      part.squares += d * d;
    }
    scratch[own.n * Gemm::kMLanes + lane] = part;
    __syncthreads();
    const int32_t o = o0 + j * Gemm::kNLanes + thread;
    if (thread < Gemm::kNLanes && o < channels) {
      const auto load = [&](int i) { return scratch[thread * Gemm::kMLanes + i]; };
      OutputPart<Acc> whole = merged_parts<Acc>(Gemm::kMLanes, load, count);
      if (bias != nullptr) whole.mean += to_acc(bias[o]);
      write_part(parts, tile, channels, o, whole);
    }
    __syncthreads();
  }
  if (o0 == 0 && thread == 0) {
    write_part_pixels(parts, tile, tiles, channels, static_cast<Acc>(left < Gemm::kM ? left : Gemm::kM));
  }
}

}  // namespace dsconv
