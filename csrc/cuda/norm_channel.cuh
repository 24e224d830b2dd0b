// What the passes of norm_plan.h do with the values of a channel, out = act(gamma * vhat + beta), vhat = (v - mean) *
// invstd; and how what was summed of a channel comes together: always in the same order.
//
// Moments are about the mean, never E[v^2] - E[v]^2: those of a few values are merged by Chan's formula into those
// before, relative to the thread's first value; threads, splits and tiles merge in double.
#pragma once

#include "activation.cuh"
#include "cuda_norm.h"
#include "dtype.cuh"
#include "reduce.cuh"

namespace dsconv {

template <NormUse kUse>
constexpr bool kIsSum = is_sum(kUse);

// moments: mean, sum of squares about it, values. sums: sum g, sum g * vhat.
struct Totals {
  double first = 0, second = 0, count = 0;
};

template <bool kMoments>
DSCONV_DEVICE void merge(Totals& to, const Totals& more) {
  if constexpr (!kMoments) {
    to.first += more.first;
    to.second += more.second;
  } else {
    if (more.count == 0) return;
    const double total = to.count + more.count, delta = more.first - to.first, share = more.count / total;
    to.first += delta * share;
    to.second += more.second + delta * delta * (to.count * share);
    to.count = total;
  }
}

// g *= act'(v). The kinds of most networks go straight through.
template <typename Acc, int kCount>
DSCONV_DEVICE void multiply_by_slope(Activation kind, const Acc (&v)[kCount], Acc (&g)[kCount]) {
  if (kind == Activation::identity) return;
  if (is_piecewise(kind)) {
    const Acc below = kind == Activation::leaky_relu ? Acc(kLeakySlope) : Acc(0);
    const bool ends = kind == Activation::relu6;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (v[i] <= Acc(0)) {
        g[i] *= below;
      } else if (ends && v[i] >= Acc(6)) {
        g[i] = 0;
      }
    }
    return;
  }
  Acc slope[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) slope[i] = v[i];
  derive_all(kind, slope);
#pragma unroll
  for (int i = 0; i < kCount; ++i) g[i] *= slope[i];
}

// What a pass has of a channel beside its values.
enum ChannelConstant { kMeanOf, kInvstdOf, kGammaOf, kBetaOf, kAcrossOf, kAlongOf, kChannelConstants };

template <typename Acc>
DSCONV_DEVICE Acc channel_constant(const NormPass& pass, int which, int64_t c) {
  const int64_t channels = pass.source.channels;
  if (which < kAcrossOf) return static_cast<Acc>(pass.vectors[which * channels + c]);
  return pass.sums == nullptr ? Acc(0) : static_cast<Acc>(pass.sums[(which - kAcrossOf) * channels + c] / pass.count);
}
template <NormUse kUse>
constexpr int kConstantsOf = kUse == NormUse::moments    ? 0
                             : kUse == NormUse::backward ? kChannelConstants
                                                         : kAcrossOf;

// A thread's work on one channel. take(): up to kCount values, of which those exist that have a bit in `exists`; grads
// are those at the values, and come back as outputs.
template <typename Acc, NormUse kUse>
class ChannelWork {
 public:
  // load(which): a ChannelConstant of this channel.
  template <typename Load>
  DSCONV_DEVICE void begin(const Load& load) {
    if constexpr (kUse != NormUse::moments) {
      mean_ = load(kMeanOf);
      invstd_ = load(kInvstdOf);
      gamma_ = load(kGammaOf);
      beta_ = load(kBetaOf);
    }
    if constexpr (kUse == NormUse::backward) {
      across_ = load(kAcrossOf);
      along_ = load(kAlongOf);
    }
  }
  DSCONV_DEVICE void begin(const NormPass& pass, int64_t c) {
    begin([&](int which) { return channel_constant<Acc>(pass, which, c); });
  }

  template <int kCount>
  DSCONV_DEVICE void take(const NormPass& pass, unsigned exists, const Acc (&values)[kCount], Acc (&grads)[kCount]) {
    if constexpr (kUse == NormUse::moments) {
      add_moments(exists, values);
    } else {
      Acc hat[kCount], affine[kCount];
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        hat[i] = (values[i] - mean_) * invstd_;
        affine[i] = gamma_ * hat[i] + beta_;
      }
      if constexpr (kUse == NormUse::forward) {
        activate_all(pass.act, affine);
#pragma unroll
        for (int i = 0; i < kCount; ++i) grads[i] = affine[i];
      } else {
        multiply_by_slope(pass.act, affine, grads);
        if constexpr (kUse == NormUse::backward) {
#pragma unroll
          for (int i = 0; i < kCount; ++i) {
            grads[i] = gamma_ * invstd_ * (grads[i] - across_ - hat[i] * along_);
          }
        } else {
          add_sums(exists, hat, grads);
        }
      }
    }
  }

  DSCONV_DEVICE Totals totals() const {
    if constexpr (kUse == NormUse::moments) {
      return {static_cast<double>(shift_) + static_cast<double>(mean_), static_cast<double>(m2_),
              static_cast<double>(count_)};
    }
    return {static_cast<double>(sum_.sum), static_cast<double>(paired_.sum), 0};
  }

 private:
  template <int kCount>
  DSCONV_DEVICE void add_moments(unsigned exists, const Acc (&values)[kCount]) {
    if (exists == 0) return;
    if (count_ == 0) {
#pragma unroll
      for (int i = kCount - 1; i >= 0; --i) {
        if ((exists >> i & 1) != 0) shift_ = values[i];
      }
    }
    Acc sum = 0, squares = 0, number = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if ((exists >> i & 1) == 0) continue;
      sum += values[i] - shift_;
      number += Acc(1);
    }
    const Acc mean = sum / number;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if ((exists >> i & 1) == 0) continue;
      const Acc d = (values[i] - shift_) - mean;
      squares += d * d;
    }
    const Acc before = static_cast<Acc>(count_), share = number / (before + number), delta = mean - mean_;
    mean_ += delta * share;
    m2_ += squares + delta * delta * (before * share);
    count_ += static_cast<int32_t>(number);
  }

  template <int kCount>
  DSCONV_DEVICE void add_sums(unsigned exists, const Acc (&hat)[kCount], const Acc (&grads)[kCount]) {
    Acc sum = 0, paired = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if ((exists >> i & 1) == 0) continue;
      sum += grads[i];
      paired += grads[i] * hat[i];
    }
    sum_.add(sum);
    paired_.add(paired);
  }

  Acc mean_ = 0;  // moments: of the values so far, from shift on
  Acc invstd_ = 0, gamma_ = 0, beta_ = 0, across_ = 0, along_ = 0;
  CompensatedSum<Acc> sum_, paired_;
  Acc shift_ = 0, m2_ = 0;
  int32_t count_ = 0;
};

// ------------------------------------------------------------------------------------------------------------ together

// Of the lanes of a warp, in all of them alike but for the order of a merge: lane 0 has the result.
template <bool kMoments>
DSCONV_DEVICE Totals totals_of_warp(Totals mine) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    const Totals other = {__shfl_xor_sync(0xffffffffu, mine.first, distance),
                          __shfl_xor_sync(0xffffffffu, mine.second, distance),
                          __shfl_xor_sync(0xffffffffu, mine.count, distance)};
    merge<kMoments>(mine, other);
  }
  return mine;
}

// The Totals of a block's threads in shared memory, neighbours in neighbouring banks.
constexpr int kTotalsDoubles = 3 * kBlockThreads;
struct TotalsOfBlock {
  double* at;  // [kTotalsDoubles]

  DSCONV_DEVICE void put(int thread, const Totals& totals) const {
    at[thread] = totals.first;
    at[kBlockThreads + thread] = totals.second;
    at[2 * kBlockThreads + thread] = totals.count;
  }
  DSCONV_DEVICE Totals get(int thread) const {
    return {at[thread], at[kBlockThreads + thread], at[2 * kBlockThreads + thread]};
  }
};

// Of `number` threads, `step` apart, of which this one is `index`: thread `index` 0 gets the result. Every thread of
// the block comes here.
template <bool kMoments>
DSCONV_DEVICE Totals totals_of_threads(const Totals& mine, int index, int step, int number, double* scratch) {
  const int thread = static_cast<int>(threadIdx.x);
  const TotalsOfBlock block{scratch};
  __syncthreads();
  block.put(thread, mine);
  __syncthreads();
  Totals total = mine;
  if (index == 0) {
    for (int i = 1; i < number; ++i) merge<kMoments>(total, block.get(thread + i * step));
  }
  return total;
}

// Of channels c .. , as vectors.
template <int kChannels>
DSCONV_DEVICE void write_totals(const NormPass& pass, int64_t split, int64_t c, const Totals (&totals)[kChannels]) {
  const int64_t channels = pass.source.channels;
  double* to = pass.partial + split * kPartialRows * channels + c;
  Vec<double, kChannels> rows[kPartialRows];
#pragma unroll
  for (int e = 0; e < kChannels; ++e) {
    rows[0].v[e] = totals[e].first;
    rows[1].v[e] = totals[e].second;
    rows[2].v[e] = totals[e].count;
  }
#pragma unroll
  for (int row = 0; row < kPartialRows; ++row)
    *reinterpret_cast<Vec<double, kChannels>*>(to + row * channels) = rows[row];
}

// Where a split begins, of `units` in `splits`.
DSCONV_HOST_DEVICE int64_t split_begin(int64_t units, int64_t split, int64_t splits) { return units * split / splits; }

}  // namespace dsconv
