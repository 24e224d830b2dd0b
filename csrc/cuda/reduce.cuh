// The second half of every sum over pixels: partial sums, one a split, added in the order of the splits, so that the
// result does not depend on which block ran first.
//
//   out[i] = partial[0][i] + partial[1][i] + ...        one thread an i; reads are coalesced
//
// Long sums are compensated: what rounding took from one addition is given to the next.
#pragma once

#include "dtype.cuh"
#include "launch_blocks.cuh"

namespace dsconv {

template <typename Acc>
struct CompensatedSum {
  Acc sum = 0, lost = 0;

  DSCONV_DEVICE void add(Acc value) {
    const Acc corrected = value - lost;
    const Acc next = sum + corrected;
    // What a sum beyond all bounds has lost is no number, and must not meet what is added to it.
    lost = next - next == 0 ? (next - sum) - corrected : Acc(0);
    sum = next;
  }
};

template <typename T>
DSCONV_KERNEL void DSCONV_BOUNDS(kBlockThreads, 2)
    sum_partials_kernel(const acc_t<T>* partial, int64_t splits, int64_t count, T* out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kBlockThreads + threadIdx.x;
  if (i >= count) return;
  CompensatedSum<acc_t<T>> total;
  for (int64_t split = 0; split < splits; ++split) total.add(partial[split * count + i]);
  out[i] = from_acc<T>(total.sum);
}

// Does nothing where the gradient was not asked for (out is null).
template <typename T>
LaunchStatus sum_partials(const acc_t<T>* partial, int64_t splits, int64_t count, void* out, cudaStream_t stream) {
  if (out == nullptr) return {};
  return launch_blocks("sum_partials", sum_partials_kernel<T>, ceil_div(count, kBlockThreads), 0, stream, partial,
                       splits, count, static_cast<T*>(out));
}

}  // namespace dsconv
