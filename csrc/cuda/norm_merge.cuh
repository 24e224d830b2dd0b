// The end of every sum over pixels of norm_plan.h: rows of partial results, merged in double and always in the same
// order. A block has kMergeChannels channels; its threads take a range of the rows each, and the ranges merge in pairs.
#pragma once

#include "launch_blocks.cuh"
#include "norm_channel.cuh"

namespace dsconv {

constexpr int kMergeChannels = 8;
constexpr int kMergeRanges = kBlockThreads / kMergeChannels;

// load(i): the Totals of row i, begin <= i < end, of this thread's channel. Threads below kMergeChannels get the
// result.
template <bool kMoments, typename Load>
DSCONV_DEVICE Totals merge_rows(int64_t begin, int64_t end, bool exists, const Load& load, double* scratch) {
  const int thread = static_cast<int>(threadIdx.x), range = thread / kMergeChannels;
  Totals mine;
  if (exists) {
    const int64_t last = begin + (end - begin) * (range + 1) / kMergeRanges;
#pragma unroll 4
    for (int64_t i = begin + (end - begin) * range / kMergeRanges; i < last; ++i) merge<kMoments>(mine, load(i));
  }
  const TotalsOfBlock block{scratch};
  block.put(thread, mine);
  __syncthreads();
  for (int half = kMergeRanges / 2; half > 0; half /= 2) {
    if (range < half) {
      merge<kMoments>(mine, block.get(thread + half * kMergeChannels));
      block.put(thread, mine);
    }
    __syncthreads();
  }
  return mine;
}

template <bool kMoments>
DSCONV_KERNEL void DSCONV_BOUNDS(kBlockThreads, 2)
    norm_merge_kernel(const double* partial, int64_t splits, int64_t channels, double* result) {
  DSCONV_SHARED(double, scratch, kTotalsDoubles);
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kMergeChannels + threadIdx.x % kMergeChannels;
  const auto load = [&](int64_t split) -> Totals {
    const double* of = partial + split * kPartialRows * channels + c;
    return {of[0], of[channels], kMoments ? of[2 * channels] : 0};
  };
  const Totals total = merge_rows<kMoments>(0, splits, c < channels, load, scratch);
  if (threadIdx.x >= kMergeChannels || c >= channels) return;
  result[c] = total.first;
  result[channels + c] = kMoments ? total.second / total.count : total.second;
}

template <bool kMoments>
LaunchStatus launch_norm_merge(const double* partial, int64_t splits, int64_t channels, double* result,
                               cudaStream_t stream) {
  return launch_blocks("norm_merge", norm_merge_kernel<kMoments>, ceil_div(channels, kMergeChannels), 0, stream,
                       partial, splits, channels, result);
}

}  // namespace dsconv
