// The passes of norm_plan.h over a tensor that is there, dense: each value is read once, and written at most once, by
// vectors.
//
//   channels together: a thread keeps to kVec channels, and goes down the rows (pixels) of its split
//
//        channels  0..3   4..7  ..           lanes read what lies together: a row, and the rows after it where a row
//   row 0          t0     t1    ..           has fewer vectors than the block has threads
//   row 1          t_across ..
//
//   pixels together: a warp keeps to a channel, and goes along segments of its planes
//
// Shared memory: kTotalsDoubles where there is something to sum; rows: the constants of the block's channels, at most
// 24 KiB. Global traffic: v, grad and out once, and the vectors of the channels once a block.
#pragma once

#include "launch_blocks.cuh"
#include "norm_channel.cuh"
#include "pixel.cuh"

namespace dsconv {

// Vectors in flight at a time.
constexpr int kNormRuns = 4;

// What is read and written at offset `at`, elements.
template <typename T, int kVec, NormUse kUse>
struct NormTensors {
  const NormPass& pass;
  using V = Vec<T, kVec>;

  DSCONV_DEVICE V value(int64_t at) const {
    return *reinterpret_cast<const V*>(static_cast<const T*>(pass.source.v) + at);
  }
  DSCONV_DEVICE V grad(int64_t at) const {
    if constexpr (kUse == NormUse::moments || kUse == NormUse::forward) return {};
    return *reinterpret_cast<const V*>(static_cast<const T*>(pass.grad) + at);
  }
  DSCONV_DEVICE void store(int64_t at, const V& out) const {
    if constexpr (!kIsSum<kUse>) *reinterpret_cast<V*>(static_cast<T*>(pass.out) + at) = out;
  }
};

template <typename T, int kVec, NormUse kUse>
DSCONV_KERNEL void DSCONV_BOUNDS(kBlockThreads, 2) norm_rows_kernel(NormPass pass, NormPlan plan) {
  using Acc = acc_t<T>;
  constexpr bool kMoments = kUse == NormUse::moments;
  const NormTensors<T, kVec, kUse> tensors{pass};
  const int thread = static_cast<int>(threadIdx.x);
  const unsigned block = blockIdx.x, groups = static_cast<unsigned>(plan.groups);
  const int64_t split = block / groups, channels = pass.source.channels;
  const int row_of_block = thread / plan.across, rows = kBlockThreads / plan.across;
  const int64_t c = ((block - split * groups) * plan.across + thread % plan.across) * kVec;
  const bool works = row_of_block < rows && c < channels;
  ChannelWork<Acc, kUse> work[kVec];
  if constexpr (!kMoments) {
    // The channels' constants, of each kind one after the other.
    DSCONV_DYNAMIC_SHARED(Acc, constants);
    const int width = plan.across * kVec;
    const int64_t first = c - thread % plan.across * kVec;
    for (int i = thread; i < kConstantsOf<kUse> * width; i += kBlockThreads) {
      const int which = i / width;
      const int64_t of = first + i - which * width;
      constants[i] = of < channels ? channel_constant<Acc>(pass, which, of) : Acc(0);
    }
    __syncthreads();
    Vec<Acc, kVec> of_thread[kConstantsOf<kUse>];
#pragma unroll
    for (int which = 0; which < kConstantsOf<kUse>; ++which) {
      of_thread[which] =
          *reinterpret_cast<const Vec<Acc, kVec>*>(constants + which * width + thread % plan.across * kVec);
    }
#pragma unroll
    for (int e = 0; e < kVec; ++e) work[e].begin([&](int which) { return of_thread[which].v[e]; });
  }
  if (works) {
    const int64_t end = split_begin(plan.units, split + 1, plan.splits);
    int64_t row = split_begin(plan.units, split, plan.splits) + row_of_block;
#pragma unroll 1
    for (; row < end; row += kNormRuns * rows) {
      Vec<T, kVec> v[kNormRuns] = {}, g[kNormRuns] = {};
      unsigned exists = 0;
#pragma unroll
      for (int r = 0; r < kNormRuns; ++r) {
        if (row + r * rows >= end) continue;
        exists |= 1u << r;
        v[r] = tensors.value((row + r * rows) * channels + c);
        g[r] = tensors.grad((row + r * rows) * channels + c);
      }
#pragma unroll
      for (int e = 0; e < kVec; ++e) {
        Acc values[kNormRuns], grads[kNormRuns];
#pragma unroll
        for (int r = 0; r < kNormRuns; ++r) values[r] = to_acc(v[r].v[e]), grads[r] = to_acc(g[r].v[e]);
        work[e].take(pass, exists, values, grads);
#pragma unroll
        for (int r = 0; r < kNormRuns; ++r) g[r].v[e] = from_acc<T>(grads[r]);
      }
#pragma unroll
      for (int r = 0; r < kNormRuns; ++r) {
        if (row + r * rows < end) tensors.store((row + r * rows) * channels + c, g[r]);
      }
    }
  }
  if constexpr (kIsSum<kUse>) {
    DSCONV_SHARED(double, scratch, kTotalsDoubles);
    Totals totals[kVec];
#pragma unroll
    for (int e = 0; e < kVec; ++e) {
      totals[e] = totals_of_threads<kMoments>(work[e].totals(), row_of_block, plan.across, rows, scratch);
    }
    if (works && row_of_block == 0) write_totals(pass, split, c, totals);
  }
}

template <typename T, int kVec, NormUse kUse>
DSCONV_KERNEL void DSCONV_BOUNDS(kBlockThreads, 2) norm_planes_kernel(NormPass pass, NormPlan plan) {
  using Acc = acc_t<T>;
  constexpr bool kMoments = kUse == NormUse::moments;
  const NormTensors<T, kVec, kUse> tensors{pass};
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const unsigned block = blockIdx.x, groups = static_cast<unsigned>(plan.groups);
  const int64_t split = block / groups, channels = pass.source.channels, plane = plan.image;
  const int64_t c = (block - split * groups) * (kBlockThreads / 32) + warp;
  const bool works = c < channels;
  ChannelWork<Acc, kUse> work;
  if (works) {
    work.begin(pass, c);
    const int64_t end = split_begin(plan.units, split + 1, plan.splits);
#pragma unroll 1
    for (int64_t unit = split_begin(plan.units, split, plan.splits); unit < end; ++unit) {
      const int64_t n = quotient(unit, plan.segments), first = (unit - n * plan.segments) * plan.segment;
      const int64_t start = (n * channels + c) * plane + first;
      const int count = static_cast<int>(plane - first < plan.segment ? plane - first : plan.segment);
#pragma unroll 1
      for (int i = lane * kVec; i < count; i += 32 * kVec * kNormRuns) {
        Vec<T, kVec> v[kNormRuns] = {}, g[kNormRuns] = {};
        unsigned exists = 0;
#pragma unroll
        for (int r = 0; r < kNormRuns; ++r) {
          const int at = i + r * 32 * kVec;
          if (at >= count) continue;
          exists |= ((1u << kVec) - 1) << r * kVec;
          v[r] = tensors.value(start + at);
          g[r] = tensors.grad(start + at);
        }
        Acc values[kNormRuns * kVec], grads[kNormRuns * kVec];
#pragma unroll
        for (int k = 0; k < kNormRuns * kVec; ++k) {
          values[k] = to_acc(v[k / kVec].v[k % kVec]);
          grads[k] = to_acc(g[k / kVec].v[k % kVec]);
        }
        work.take(pass, exists, values, grads);
#pragma unroll
        for (int r = 0; r < kNormRuns; ++r) {
          const int at = i + r * 32 * kVec;
          if (at >= count) continue;
          Vec<T, kVec> out;
#pragma unroll
          for (int e = 0; e < kVec; ++e) out.v[e] = from_acc<T>(grads[r * kVec + e]);
          tensors.store(start + at, out);
        }
      }
    }
  }
  if constexpr (kIsSum<kUse>) {
    const Totals total[1] = {totals_of_warp<kMoments>(work.totals())};
    if (works && lane == 0) write_totals(pass, split, c, total);
  }
}

template <typename T, int kVec, NormUse kUse>
LaunchStatus launch_norm_tensor(const NormPass& pass, const NormPlan& plan, cudaStream_t stream) {
  if (pass.source.layout == Layout::nhwc) {
    const size_t constants = sizeof(acc_t<T>) * static_cast<size_t>(kConstantsOf<kUse> * plan.across * kVec);
    return launch_blocks("norm_rows", norm_rows_kernel<T, kVec, kUse>, plan.blocks, constants, stream, pass, plan);
  }
  return launch_blocks("norm_planes", norm_planes_kernel<T, kVec, kUse>, plan.blocks, 0, stream, pass, plan);
}

}  // namespace dsconv
