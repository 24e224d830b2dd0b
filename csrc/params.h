// Plain-old-data descriptions of one call, shared by the host entries and both backends.
//
//   z = dw_weight * x + dw_bias            depthwise, c_mid = c_in * multiplier channels
//   y = out_act(pw_weight . act(z) + pw_bias)
//
// Nothing here knows torch, Python or CUDA: a kernel sees raw pointers, sizes and strides.
// Every stride is in elements, never in bytes.
#pragma once

#include <cstdint>

namespace dsconv {

enum class DType : int32_t { f32, f64, f16, bf16 };

// The numbers are part of the op schema: dsconv_cuda/activations.py holds the same list.
enum class Activation : int32_t {
  identity = 0,
  relu = 1,
  relu6 = 2,
  leaky_relu = 3,  // slope 0.01
  silu = 4,
  hardswish = 5,
  gelu = 6,       // exact, by erf
  gelu_tanh = 7,  // tanh approximation
  sigmoid = 8,
  tanh = 9,
  hardsigmoid = 10,
};
constexpr int32_t kActivationCount = 11;

// Which value an out_activation's derivative is computed from in backward. These can be told from y alone, exactly;
// the others need the value before the activation ("pre"), which forward then writes as a second output.
constexpr bool derivative_from_output(Activation a) {
  return a == Activation::identity || a == Activation::relu || a == Activation::relu6 || a == Activation::leaky_relu ||
         a == Activation::sigmoid || a == Activation::tanh;
}

// Those that are a clamp of the value, and cost a kernel next to nothing.
constexpr bool is_clamp(Activation a) {
  return a == Activation::identity || a == Activation::relu || a == Activation::relu6;
}

// The dimension along which an activation tensor has unit stride.
enum class Layout : int32_t {
  nchw,  // unit stride along w
  nhwc,  // unit stride along c
};

struct Strides {
  int64_t n, c, h, w;
  int64_t d;  // of 3-D convolutions, from one slice of an image to the next
};

// The ops' arguments that are no tensors, along depth, height and width. padding is (front, top, left, back, bottom,
// right). dims: 2 or 3; in 2-D what concerns the depth is one, and padding zero.
struct CallArguments {
  int64_t dims, stride[3], padding[6], dilation[3], act, out_act;
};

struct Geometry {
  int64_t n;           // images
  int64_t c_in;        // channels of x
  int64_t multiplier;  // depthwise channels per input channel: z channel j reads x channel j / multiplier
  int64_t c_mid;       // c_in * multiplier
  int64_t c_out;
  int64_t h_in, w_in;
  int64_t h_out, w_out;
  int64_t kernel_h, kernel_w;
  int64_t stride_h, stride_w;
  int64_t pad_top, pad_left;  // bottom and right follow from h_out and w_out
  int64_t dilation_h, dilation_w;
  // 3-D: an image is d_in slices of h_in x w_in. All one, and pad_front zero, in 2-D.
  int64_t d_in, d_out, kernel_d, stride_d, pad_front, dilation_d;
};

// Whether an image has slices, before or after the convolution.
constexpr bool has_depth(const Geometry& g) { return g.d_in > 1 || g.d_out > 1; }
// Whether the depth plays no part, not even as several taps on one slice.
constexpr bool is_flat(const Geometry& g) { return !has_depth(g) && g.kernel_d == 1; }

// Slices of all images, before and after; pixels of all slices; taps of a channel's depthwise kernel. The kernels of a
// GPU count with them too.
#if defined(__CUDACC__)
#define DSCONV_COUNT __host__ __device__ constexpr int64_t
#else
#define DSCONV_COUNT constexpr int64_t
#endif
DSCONV_COUNT input_slices(const Geometry& g) { return g.n * g.d_in; }
DSCONV_COUNT input_pixels(const Geometry& g) { return input_slices(g) * g.h_in * g.w_in; }
DSCONV_COUNT output_slices(const Geometry& g) { return g.n * g.d_out; }
DSCONV_COUNT output_pixels(const Geometry& g) { return output_slices(g) * g.h_out * g.w_out; }
DSCONV_COUNT tap_count(const Geometry& g) { return g.kernel_d * g.kernel_h * g.kernel_w; }
#undef DSCONV_COUNT

struct ForwardParams {
  Geometry geom;
  DType dtype;  // of every tensor of the call
  Activation act, out_act;
  bool tf32;  // f32 products of the pointwise stage may round their operands to TF32; the CPU never does

  const void* x;  // [n, c_in, d_in, h_in, w_in], x_strides
  Strides x_strides;
  Layout x_layout;
  const void* dw_weight;  // [c_mid, kernel_d, kernel_h, kernel_w], contiguous
  const void* dw_bias;    // [c_mid] or null
  const void* pw_weight;  // [c_out, c_mid], contiguous
  const void* pw_bias;    // [c_out] or null

  void* y;  // [n, c_out, d_out, h_out, w_out], y_strides, dense
  Strides y_strides;
  Layout y_layout;
  void* pre;  // y before out_act, strides of y; null where it is not asked for

  // CUDA: null, or what the moments of y before out_act are merged from, in the type of the accumulators: of each tile
  // of pixels mean and sum of squares about it, [tiles][2][c_out], then [tiles] the number of its pixels.
  void* y_parts;
};

// grad_* pointers are null for gradients that were not asked for.
struct BackwardParams {
  Geometry geom;
  DType dtype;
  Activation act, out_act;
  bool tf32;

  const void* x;
  Strides x_strides;
  Layout x_layout;
  const void* dw_weight;
  const void* dw_bias;
  const void* pw_weight;

  const void* dy;  // [n, c_out, d_out, h_out, w_out], dy_strides
  Strides dy_strides;
  Layout dy_layout;
  const void* saved;  // y where derivative_from_output(out_act), else pre; null for out_act == identity
  Strides saved_strides;
  Layout saved_layout;

  void* grad_x;  // [n, c_in, d_in, h_in, w_in], grad_x_strides, dense
  Strides grad_x_strides;
  Layout grad_x_layout;
  void* grad_dw_weight;  // [c_mid, kernel_d, kernel_h, kernel_w], contiguous
  void* grad_pw_weight;  // [c_out, c_mid], contiguous
  void* grad_dw_bias;    // [c_mid]
  void* grad_pw_bias;    // [c_out]
};

// Whether the CPU's backward reads x and writes grad_x where they are: channels next to one another, in the compute
// type.
constexpr bool walked_in_place(const BackwardParams& p) {
  return (p.dtype == DType::f32 || p.dtype == DType::f64) && p.x_layout == Layout::nhwc &&
         (p.grad_x == nullptr || p.grad_x_layout == Layout::nhwc);
}

// Bits of the grad_mask argument of dsconv_cuda::bwd.
enum GradBit : int64_t {
  kGradX = 1,
  kGradDwWeight = 2,
  kGradPwWeight = 4,
  kGradDwBias = 8,
  kGradPwBias = 16,
};

}  // namespace dsconv
