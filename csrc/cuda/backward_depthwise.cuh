// Backward, stage D: everything that contracts with the depthwise kernel, from du = gradient of z (stage P).
//
//   grad_x[n, ci, id, ih, iw]     = sum over the multiplier's c and taps of du[c][n, od, oh, ow] *
//   dw_weight[c][kd][kh][kw]
//       where oh * stride_h = ih + pad_top - kh * dilation_h, od and ow likewise: the transposed depthwise, gathered
//   grad_dw_weight[c][kd][kh][kw] = sum over q of du[c][q] * x[n, c / multiplier, d, row, col]
//       d, row and col as in depthwise.cuh
//   grad_dw_bias[c]               = sum over q of du[c][q]
//
// grad_x kernel: one thread an element of grad_x, numbered as it lies in memory, so stores are coalesced, and so are
// the loads of du where it has the same layout. du comes through L1: neighbours share their taps there. No shared
// memory.
//
// depthwise_sum kernel (grad_dw_weight, grad_dw_bias): a block of 8 warps owns one split of the pixels for
//
//   x unit-strided along w: one channel;                   lane l of warp w sums the pixels 32 * w + l + 256 * i
//   x unit-strided along c: kDepthwiseChannels channels;   lane l is a channel, warp w sums the pixels w + 8 * i
//
// and all taps of a kd of a 3x3 or 5x5 kernel at once, in registers, else kTapGroup of them. The lanes of a warp are
// then added by shuffles (along w), the warps through shared memory: always the same tree. One partial sum a split, see
// reduce.cuh. Shared memory: 8 x 32 accumulators, 1024 or 2048 bytes.
// Both are for double, for a channel multiplier's grad_x and for what does not fit a box: the way otherwise is
// backward_depthwise_tiles.cuh or backward_depthwise_both_tiles.cuh where channels, backward_depthwise_planes.cuh where
// columns are adjacent in memory.
//
// Global traffic: grad_x reads du and writes grad_x once; depthwise_sum reads du and x once a tap group.
// Preconditions: grad_x is dense, x as in forward.cuh.
#pragma once

#include "backward_depthwise_both_tiles.cuh"
#include "backward_depthwise_planes.cuh"
#include "backward_depthwise_tiles.cuh"
#include "depthwise.cuh"
#include "reduce.cuh"

namespace dsconv {

// -------------------------------------------------------------------------------------------------------------- grad_x

template <typename T, int kKernel>
DSCONV_KERNEL void DSCONV_BOUNDS(kBlockThreads, 2) grad_x_kernel(BackwardParams p, const T* du, Strides du_strides) {
  const Geometry& g = p.geom;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kBlockThreads + threadIdx.x;
  if (index >= input_pixels(g) * g.c_in) return;
  const bool along_w = p.grad_x_layout == Layout::nchw;
  int64_t c, plane;  // plane: the element's place with c taken out, ((n * d_in + id) * h_in + ih) * w_in + iw
  if (along_w) {
    const int64_t image = g.d_in * g.h_in * g.w_in, nc = quotient(index, image), n = quotient(nc, g.c_in);
    c = nc - n * g.c_in;
    plane = index - nc * image + n * image;
  } else {
    plane = quotient(index, g.c_in);
    c = index - plane * g.c_in;
  }
  const Pixel at = pixel_at(plane, g.d_in, g.h_in, g.w_in);

  const int32_t kernel_h = kKernel > 0 ? kKernel : static_cast<int32_t>(g.kernel_h);
  const int32_t kernel_w = kKernel > 0 ? kKernel : static_cast<int32_t>(g.kernel_w);
  const int32_t stride_h = static_cast<int32_t>(g.stride_h), stride_w = static_cast<int32_t>(g.stride_w);
  const int32_t h_out = static_cast<int32_t>(g.h_out), w_out = static_cast<int32_t>(g.w_out);
  const int32_t stride_d = static_cast<int32_t>(g.stride_d), kernel_d = static_cast<int32_t>(g.kernel_d);
  const int32_t row0 = at.row + static_cast<int32_t>(g.pad_top), col0 = at.col + static_cast<int32_t>(g.pad_left);
  [[maybe_unused]] constexpr int kUnroll = kKernel > 0 ? kKernel : 1;
  acc_t<T> sum = 0;
#pragma unroll 1
  for (int64_t m = c * g.multiplier; m < (c + 1) * g.multiplier; ++m) {
#pragma unroll 1
    for (int32_t kd = 0; kd < kernel_d; ++kd) {
      const int32_t depth = at.depth + static_cast<int32_t>(g.pad_front) - kd * static_cast<int32_t>(g.dilation_d);
      const int32_t od = stride_d == 1 ? depth : depth / stride_d;
      if (depth < 0 || od * stride_d != depth || od >= static_cast<int32_t>(g.d_out)) continue;
      const T* source = du + at.n * du_strides.n + od * du_strides.d + m * du_strides.c;
      const T* weight = static_cast<const T*>(p.dw_weight) + (m * kernel_d + kd) * kernel_h * kernel_w;
#pragma unroll kUnroll
      for (int32_t kh = 0; kh < kernel_h; ++kh) {
        const int32_t row = row0 - kh * static_cast<int32_t>(g.dilation_h);
        const int32_t oh = stride_h == 1 ? row : row / stride_h;
        if (row < 0 || oh * stride_h != row || oh >= h_out) continue;
        acc_t<T> row_sum = 0;
#pragma unroll kUnroll
        for (int32_t kw = 0; kw < kernel_w; ++kw) {
          const int32_t col = col0 - kw * static_cast<int32_t>(g.dilation_w);
          const int32_t ow = stride_w == 1 ? col : col / stride_w;
          if (col < 0 || ow * stride_w != col || ow >= w_out) continue;
          row_sum = fused_multiply_add(to_acc(source[oh * du_strides.h + ow * du_strides.w]),
                                       to_acc(weight[kh * kernel_w + kw]), row_sum);
        }
        sum += row_sum;
      }
    }
  }
  static_cast<T*>(p.grad_x)[index] = from_acc<T>(sum);
}

// ------------------------------------------------------------------------------------------------ grad_dw_weight,
// _bias

constexpr int kWarps = kBlockThreads / 32;

// The sum over a block, of all threads (along_w) or of each lane's warps; valid in warp 0, in lane 0 or in every lane.
template <typename Acc>
DSCONV_DEVICE Acc sum_over_block(Acc value, bool along_w, Acc* scratch) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  if (along_w) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
  }
  __syncthreads();
  scratch[warp * 32 + lane] = value;
  __syncthreads();
  Acc sum = 0;
  if (warp == 0) {
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += scratch[w * 32 + lane];
  }
  return sum;
}

// weight_partial [splits][c_mid][taps], bias_partial [splits][c_mid]; either may be null.
template <typename T, int kKernel>
DSCONV_KERNEL void DSCONV_BOUNDS(kBlockThreads, 2)
    depthwise_sum_kernel(BackwardParams p, const T* du, Strides du_strides, acc_t<T>* weight_partial,
                         acc_t<T>* bias_partial, int64_t split_pixels, unsigned channel_tiles, unsigned tap_groups) {
  using Acc = acc_t<T>;
  constexpr int kTaps = kKernel > 0 ? kKernel * kKernel : kTapGroup;  // of a group
  DSCONV_SHARED(Acc, scratch, kBlockThreads);
  const Geometry& g = p.geom;
  const bool along_w = p.x_layout == Layout::nchw;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  const unsigned channel_tile = blockIdx.x / tap_groups % channel_tiles;
  const int64_t split = blockIdx.x / tap_groups / channel_tiles;
  const int32_t first_tap = static_cast<int32_t>(blockIdx.x % tap_groups) * kTaps;
  const int32_t kernel_w = kKernel > 0 ? kKernel : static_cast<int32_t>(g.kernel_w);
  const int32_t plane_taps = kKernel > 0 ? kTaps : static_cast<int32_t>(g.kernel_h) * kernel_w;
  const int32_t taps = plane_taps * static_cast<int32_t>(g.kernel_d);
  const int32_t d_in = static_cast<int32_t>(g.d_in), h_in = static_cast<int32_t>(g.h_in);
  const int32_t w_in = static_cast<int32_t>(g.w_in);

  const int64_t c = along_w ? channel_tile : static_cast<int64_t>(channel_tile) * kDepthwiseChannels + lane;
  const int64_t pixel_count = output_pixels(g);
  const int64_t q_end = (split + 1) * split_pixels < pixel_count ? (split + 1) * split_pixels : pixel_count;
  const T* x = static_cast<const T*>(p.x) + quotient(c, g.multiplier) * p.x_strides.c;
  const T* source = du + c * du_strides.c;

  // Each tap's step from the window's corner. A tap beyond the last one steps below x.
  int32_t tap_depth[kTaps], tap_row[kTaps], tap_col[kTaps];
#pragma unroll
  for (int t = 0; t < kTaps; ++t) {
    const int32_t tap = first_tap + t, kd = kKernel > 0 ? first_tap / kTaps : tap / plane_taps;
    const int32_t in_plane = kKernel > 0 ? t : tap - kd * plane_taps;
    const int32_t kh = in_plane / kernel_w, kw = in_plane - kh * kernel_w;
    tap_depth[t] = kd * static_cast<int32_t>(g.dilation_d);
    tap_row[t] =
        kKernel > 0 || tap < taps ? kh * static_cast<int32_t>(g.dilation_h) : h_in + static_cast<int32_t>(g.pad_top);
    tap_col[t] = kw * static_cast<int32_t>(g.dilation_w);
  }

  Acc sums[kTaps] = {};
  Acc bias_sum = 0;
  if (c < g.c_mid) {
#pragma unroll 1
    for (int64_t q = split * split_pixels + (along_w ? thread : thread / 32); q < q_end;
         q += along_w ? kBlockThreads : kWarps) {
      const Pixel at = output_pixel_at(q, g);
      const Acc grad = to_acc(source[pixel_offset(at, du_strides)]);
      bias_sum += grad;
      if (weight_partial == nullptr) continue;
      const Window window = window_at(at, g, p.x_strides);
#pragma unroll
      for (int t = 0; t < kTaps; ++t) {
        if (inside(window.depth + tap_depth[t], d_in) && inside(window.row + tap_row[t], h_in) &&
            inside(window.col + tap_col[t], w_in)) {
          const int64_t offset =
              window.offset + tap_depth[t] * p.x_strides.d + tap_row[t] * p.x_strides.h + tap_col[t] * p.x_strides.w;
          sums[t] = fused_multiply_add(to_acc(x[offset]), grad, sums[t]);
        }
      }
    }
  }

  const bool writes = thread < (along_w ? 1 : 32) && c < g.c_mid;
  if (weight_partial != nullptr) {
#pragma unroll
    for (int t = 0; t < kTaps; ++t) {
      const Acc sum = sum_over_block(sums[t], along_w, scratch);
      if (writes && (kKernel > 0 || first_tap + t < taps))
        weight_partial[(split * g.c_mid + c) * taps + first_tap + t] = sum;
    }
  }
  if (bias_partial != nullptr) {
    const Acc sum = sum_over_block(bias_sum, along_w, scratch);
    if (writes && first_tap == 0) bias_partial[split * g.c_mid + c] = sum;
  }
}

// ------------------------------------------------------------------------------------------------------------ launcher

template <typename T, int kKernel>
LaunchStatus launch_depthwise_kernels(const BackwardParams& p, const BackwardPlan& plan, void* workspace,
                                      cudaStream_t stream) {
  using Acc = acc_t<T>;
  const Geometry& g = p.geom;
  const T* du = at_byte<const T>(workspace, plan.du_at);
  Acc* weight = p.grad_dw_weight != nullptr ? at_byte<Acc>(workspace, plan.dw_weight_at) : nullptr;
  Acc* bias = p.grad_dw_bias != nullptr ? at_byte<Acc>(workspace, plan.dw_bias_at) : nullptr;
  LaunchStatus status;
  if constexpr (sizeof(T) < 8) {
    if (plan.tiles.both) {
      status = launch_depthwise_tiles<T>(p, plan.tiles, du, plan.du_strides, weight, bias, stream);
    } else if (plan.tiles.grad_x) {
      status = launch_grad_x_tiles<T>(p, plan.tiles, du, plan.du_strides, stream);
    }
    if (plan.planes.grad_x || plan.planes.sums) {
      status = launch_depthwise_planes<T>(p, plan.planes, du, plan.du_strides, plan.planes.sums ? weight : nullptr,
                                          plan.planes.sums ? bias : nullptr, stream);
    }
  }
  if (p.grad_x != nullptr && !plan.tiles.grad_x && !plan.planes.grad_x && status.error == 0) {
    status = launch_blocks("grad_x", grad_x_kernel<T, kKernel>, plan.grad_x_blocks, 0, stream, p, du, plan.du_strides);
  }
  if (plan.dw_sums && status.error == 0) {
    if (!plan.tiles.sums && !plan.planes.sums) {
      status = launch_blocks("depthwise_sum", depthwise_sum_kernel<T, kKernel>, plan.dw_blocks, 0, stream, p, du,
                             plan.du_strides, weight, bias, plan.dw_split.pixels,
                             static_cast<unsigned>(plan.dw_channel_tiles), static_cast<unsigned>(plan.dw_tap_groups));
    }
    if constexpr (sizeof(T) < 8) {
      if (plan.tiles.sums && !plan.tiles.both) {
        status = launch_depthwise_sum_tiles<T>(p, plan.tiles, du, plan.du_strides, weight, bias, stream);
      }
    }
    if (status.error == 0) {
      status = sum_partials<T>(weight, plan.dw_split.count, g.c_mid * tap_count(g), p.grad_dw_weight, stream);
    }
    if (status.error == 0) status = sum_partials<T>(bias, plan.dw_split.count, g.c_mid, p.grad_dw_bias, stream);
  }
  return status;
}

template <DType kType>
LaunchStatus launch_backward_depthwise(const BackwardParams& p, const BackwardPlan& plan, void* workspace,
                                       void* stream) {
  using T = storage_t<kType>;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  switch (plan.kernel) {
    case 3:
      return launch_depthwise_kernels<T, 3>(p, plan, workspace, cuda_stream);
    case 5:
      return launch_depthwise_kernels<T, 5>(p, plan, workspace, cuda_stream);
    default:
      return launch_depthwise_kernels<T, 0>(p, plan, workspace, cuda_stream);
  }
}

}  // namespace dsconv
