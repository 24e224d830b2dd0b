// Small kernels for counter_cases.cpp, instrumented as the library's are. One warp a block unless a comment says more.

#include "../../csrc/cuda/dtype.cuh"
#include "../../csrc/cuda/portability.cuh"
#include "../../csrc/cuda/ptx.cuh"

namespace counted {

using namespace dsconv;

DSCONV_DEVICE int lane() { return static_cast<int>(threadIdx.x); }

DSCONV_KERNEL void copy(const float* x, float* y, int stride, int offset) { y[lane()] = x[lane() * stride + offset]; }

DSCONV_KERNEL void copy_vectors(const float* x, float* y) {
  const Vec<float, 4> v = reinterpret_cast<const Vec<float, 4>*>(x)[lane()];
  reinterpret_cast<Vec<float, 4>*>(y)[lane()] = {v.v[3], v.v[2], v.v[1], v.v[0]};
}

// Lane l takes the taps from l % 3 on, and lanes loop as often as they have taps: what is skipped must not push what
// follows into another instruction.
DSCONV_KERNEL void skip_taps(const float* x, float* y, int taps) {
  float sum = 0;
#pragma unroll 1
  for (int row = 0; row < 2; ++row) {
#pragma unroll 1
    for (int tap = 0; tap < taps; ++tap) {
      if (tap >= lane() % 3) sum += x[(row * taps + tap) * 32 + lane()];
    }
  }
  y[lane()] = sum;
}

DSCONV_KERNEL void loop_unequally(const float* x, float* y) {
  float sum = 0;
#pragma unroll 1
  for (int i = 0; i <= lane() / 8; ++i) sum += x[i * 32 + lane()];
  y[lane()] = sum;
}

// Each lane writes 4 bytes at its number times `stride` words, and reads what lane 0 wrote.
DSCONV_KERNEL void through_shared(float* y, int stride) {
  DSCONV_DYNAMIC_SHARED(float, a);
  a[lane() * stride] = 1;
  __syncthreads();
  y[lane()] = a[0];
}

// 16 bytes a lane; rows of `stride` words.
DSCONV_KERNEL void shared_vectors(float* y, int stride) {
  DSCONV_DYNAMIC_SHARED(float, a);
  *reinterpret_cast<Vec<float, 4>*>(a + lane() * stride) = {1, 2, 3, 4};
  __syncthreads();
  const Vec<float, 4> v = *reinterpret_cast<const Vec<float, 4>*>(a + lane() * stride);
  y[lane()] = v.v[0] + v.v[3];
}

// Half a warp's copies are not valid and read nothing.
DSCONV_KERNEL void copy_async(const float* x, float* y) {
  DSCONV_DYNAMIC_SHARED(float, a);
  cp_async<16>(a + 4 * lane(), x + 4 * lane(), lane() < 16 ? 16 : 0);
  cp_async_commit();
  cp_async_wait<0>();
  y[lane()] = a[4 * lane()];
}

// Rows of `stride` 16-bit elements.
DSCONV_KERNEL void read_matrices(float* y, int stride) {
  DSCONV_DYNAMIC_SHARED(Half, a);
  uint32_t out[4];
  ldmatrix_x4(a + lane() * stride, out);
  y[lane()] = static_cast<float>(out[0] & 1);
}

}  // namespace counted
