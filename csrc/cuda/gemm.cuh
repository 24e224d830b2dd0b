// The register-tiled product of two tiles in shared memory, the inner loop of all three pointwise kernels:
//
//   acc[m][n] += sum over k of a[k][m] * b[n][k]
//
//   a: kDepth rows of kM elements, unit stride along m          b: kN rows of kDepth elements, unit stride along k
//
// Thread ownership, kMLanes x kNLanes threads, 4 consecutive m and every kNLanes-th n each:
//
//            n  0    1   ..  kNLanes  ..            A step reads a as 4 consecutive elements, and b 16 bytes along k.
//   m 0-3      t00  t01      t00                    Rows of b are padded by 16 bytes: 8 neighbouring lanes then read
//     4-7      t10  t11      t10                    8 x 16 bytes from 32 different banks.
//
// Which of the two lane numbers runs fastest inside a warp is the caller's choice: it decides which of m and n the
// results are coalesced along. This is the form mma.m16n8k16 takes its operands in (b "col", a through ldmatrix.trans).
#pragma once

#include "dtype.cuh"

namespace dsconv {

constexpr int kThreadM = 4;

// A tile of kM x kN results in the registers of kThreads threads; the contraction runs in chunks of kDepth.
template <typename Acc, int kM_, int kN_, int kDepth_, int kThreads_>
struct GemmTile {
  static constexpr int kM = kM_, kN = kN_, kDepth = kDepth_, kThreads = kThreads_;
  static constexpr int kMLanes = kM / kThreadM;
  static constexpr int kNLanes = kThreads / kMLanes;
  static constexpr int kThreadN = kN / kNLanes;
  static_assert(kM % kThreadM == 0 && kThreads % kMLanes == 0 && kN % kNLanes == 0, "the threads tile the results");
  static_assert(kThreads % 32 == 0 && kThreads <= 1024, "whole warps");

  using Registers = Acc[kThreadM][kThreadN];

  int m, n;  // the first row and column of this thread; the others are m + 1.. and n + kNLanes * j

  // `n_fastest`: neighbouring lanes own neighbouring n.
  DSCONV_DEVICE static GemmTile of_thread(bool n_fastest) {
    const int t = static_cast<int>(threadIdx.x);
    return n_fastest ? GemmTile{t / kNLanes * kThreadM, t % kNLanes} : GemmTile{t % kMLanes * kThreadM, t / kMLanes};
  }

  // One chunk. Rounding errors grow with the length of a chain of additions, and a contraction has thousands: in single
  // precision a chunk's products are summed apart and then added to `acc`.
  template <int kAStride, int kBStride, typename TA, typename TB>
  DSCONV_DEVICE void multiply(const TA* a, const TB* b, Registers& acc) const {
    if constexpr (sizeof(Acc) == 8) {
      multiply_add<kAStride, kBStride>(a, b, acc);
    } else {
      Registers chunk = {};
      multiply_add<kAStride, kBStride>(a, b, chunk);
#pragma unroll
      for (int i = 0; i < kThreadM; ++i) {
#pragma unroll
        for (int j = 0; j < kThreadN; ++j) acc[i][j] += chunk[i][j];
      }
    }
  }

 private:
  template <int kAStride, int kBStride, typename TA, typename TB>
  DSCONV_DEVICE void multiply_add(const TA* a, const TB* b, Registers& acc) const {
    constexpr int kStep = kVecWidth<TB>;
    static_assert(kDepth % kStep == 0 && kBStride % kStep == 0 && kAStride * sizeof(TA) % sizeof(Vec<TA, 4>) == 0,
                  "vectors of a and b are aligned");
#pragma unroll 1
    for (int k = 0; k < kDepth; k += kStep) {
      Vec<TB, kStep> b_step[kThreadN];
#pragma unroll
      for (int j = 0; j < kThreadN; ++j) {
        b_step[j] = *reinterpret_cast<const Vec<TB, kStep>*>(b + (n + j * kNLanes) * kBStride + k);
      }
#pragma unroll
      for (int s = 0; s < kStep; ++s) {
        const Vec<TA, kThreadM> a_step = *reinterpret_cast<const Vec<TA, kThreadM>*>(a + (k + s) * kAStride + m);
#pragma unroll
        for (int j = 0; j < kThreadN; ++j) {
          const Acc b_value = to_acc(b_step[j].v[s]);
#pragma unroll
          for (int i = 0; i < kThreadM; ++i) {
            acc[i][j] = fused_multiply_add(Acc(to_acc(a_step.v[i])), b_value, acc[i][j]);
          }
        }
      }
    }
  }
};

}  // namespace dsconv
