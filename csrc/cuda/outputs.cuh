// What a library's product leaves to be done: bias and out_act over its outputs, in place; and out_act' before it.
//
//   pre = y + pw_bias,  y = out_act(pre)          where `bias` is asked for, and pre where it is
//
// y and pre are dense. A thread has 16 bytes of them, of one channel or several; its place is divided out once.
// Global traffic: y once each way, pre once.
#pragma once

#include "activation.cuh"
#include "dtype.cuh"
#include "launch_blocks.cuh"
#include "pixel.cuh"

namespace dsconv {

template <typename T>
DSCONV_KERNEL void DSCONV_BOUNDS(kBlockThreads, 2) outputs_kernel(ForwardParams p, bool add_bias) {
  constexpr int kVec = kVecWidth<T>;
  const Geometry& g = p.geom;
  const int64_t pixels = g.d_out * g.h_out * g.w_out, count = g.n * g.c_out * pixels;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kBlockThreads + threadIdx.x) * kVec;
  if (first >= count) return;
  T* y = static_cast<T*>(p.y) + first;
  T* pre = p.pre != nullptr ? static_cast<T*>(p.pre) + first : nullptr;
  const bool vector = first + kVec <= count && is_aligned(y, 16) && (pre == nullptr || is_aligned(pre, 16));
  Vec<T, kVec> v = {};
  if (vector) v = *reinterpret_cast<const Vec<T, kVec>*>(y);
  acc_t<T> values[kVec];
#pragma unroll
  for (int e = 0; e < kVec; ++e) {
    if (!vector && first + e < count) v.v[e] = y[e];
    values[e] = to_acc(v.v[e]);
  }
  if (add_bias) {
    const T* bias = static_cast<const T*>(p.pw_bias);
    const int64_t run = p.y_layout == Layout::nhwc ? 1 : pixels;  // elements of a channel that lie together
    const int64_t runs = quotient(first, run);
    int64_t in_run = first - runs * run, c = runs - quotient(runs, g.c_out) * g.c_out;
#pragma unroll
    for (int e = 0; e < kVec; ++e) {
      values[e] += to_acc(bias[c]);
      if (++in_run < run) continue;
      in_run = 0;
      if (++c == g.c_out) c = 0;
    }
  }
  const auto store = [&](T* to) {
    Vec<T, kVec> packed;
#pragma unroll
    for (int e = 0; e < kVec; ++e) packed.v[e] = from_acc<T>(values[e]);
    if (vector) {
      *reinterpret_cast<Vec<T, kVec>*>(to) = packed;
      return;
    }
#pragma unroll
    for (int e = 0; e < kVec; ++e) {
      if (first + e < count) to[e] = packed.v[e];
    }
  };
  if (pre != nullptr) store(pre);
  activate_all(p.out_act, values);
  store(y);
}

// g = dy * out_act'(saved), all three dense and in one layout.
template <typename T>
DSCONV_KERNEL void DSCONV_BOUNDS(kBlockThreads, 2) gradient_kernel(BackwardParams p, T* g, int64_t count) {
  constexpr int kVec = kVecWidth<T>;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kBlockThreads + threadIdx.x) * kVec;
  if (first >= count) return;
  const T* dy = static_cast<const T*>(p.dy) + first;
  const T* saved = static_cast<const T*>(p.saved) + first;
  const bool vector = first + kVec <= count && is_aligned(dy, 16) && is_aligned(saved, 16);
  Vec<T, kVec> grad = {}, from = {};
  if (vector) {
    grad = *reinterpret_cast<const Vec<T, kVec>*>(dy);
    from = *reinterpret_cast<const Vec<T, kVec>*>(saved);
  }
  acc_t<T> slope[kVec];
#pragma unroll
  for (int e = 0; e < kVec; ++e) {
    if (!vector && first + e < count) grad.v[e] = dy[e], from.v[e] = saved[e];
    slope[e] = to_acc(from.v[e]);
  }
  derive_all_from_saved(p.out_act, slope);
#pragma unroll
  for (int e = 0; e < kVec; ++e) grad.v[e] = from_acc<T>(to_acc(grad.v[e]) * slope[e]);
  if (first + kVec <= count) {  // the workspace is aligned
    *reinterpret_cast<Vec<T, kVec>*>(g + first) = grad;
    return;
  }
#pragma unroll
  for (int e = 0; e < kVec; ++e) {
    if (first + e < count) g[first + e] = grad.v[e];
  }
}

template <DType kType>
LaunchStatus launch_gradient(const BackwardParams& p, void* g, void* stream) {
  using T = storage_t<kType>;
  return launch_blocks("gradient", gradient_kernel<T>, outputs_blocks(p.geom, p.dtype), 0,
                       static_cast<cudaStream_t>(stream), p, static_cast<T*>(g), output_pixels(p.geom) * p.geom.c_out);
}

template <DType kType>
LaunchStatus launch_outputs(const ForwardParams& p, bool add_bias, void* stream) {
  return launch_blocks("outputs", outputs_kernel<storage_t<kType>>, outputs_blocks(p.geom, p.dtype), 0,
                       static_cast<cudaStream_t>(stream), p, add_bias);
}

}  // namespace dsconv
