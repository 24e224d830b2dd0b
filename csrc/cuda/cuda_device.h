// What the planner may know of a GPU: limits that cudaDeviceGetAttribute tells, and rates, which it does not. Plain
// host C++, with a table of one GPU an architecture, so that a plan can be asked for without one.
#pragma once

#include <cstdint>

namespace dsconv {

struct DeviceLimits {
  int64_t multiprocessors = 132;
  int64_t capability = 90;  // 10 * major + minor

  int64_t shared_per_block = 227 << 10;  // the most that a block may ask for
  int64_t shared_per_multiprocessor = 228 << 10;
  int64_t shared_reserved = 1 << 10;  // of each block, by the driver
  int64_t threads_per_multiprocessor = 2048;
  int64_t blocks_per_multiprocessor = 32;

  int64_t l2_bytes = int64_t{50} << 20;
  double bandwidth = 3.35e12, l2_bandwidth = 5.5e12;  // bytes a second, of DRAM and of L2
  // Multiply-adds a second: outside of the tensor cores, and of mma.sync with sums in fp32.
  double fma_f32 = 33.5e12, fma_f64 = 16.7e12, mma_f16 = 307e12, mma_tf32 = 153e12;
};

struct Gpu {
  const char* architecture;
  const char* name;
  DeviceLimits limits;
};

// Limits: the tables of compute capabilities in NVIDIA's programming guide. Bandwidth and rates: the makers' data
// sheets at boost clock, dense. Assumed, for lack of a data sheet: l2_bandwidth (published micro-benchmarks, rounded);
// on sm_90 and sm_100 mma.sync reaches 62 % of what the data sheet gives for wgmma, counted by multiprocessors.
// sm_75 has no TF32; its tensor cores take fp16 only.
// clang-format off
constexpr Gpu kGpus[] = {
    //                               SMs  cc   shared memory, block and SM     threads, blocks  L2
    //                               bytes/s: DRAM, L2      multiply-adds/s: f32, f64, mma f16, mma tf32
    {"sm_75", "T4",                 {40,  75,  64 << 10,  64 << 10, 0,         1024, 16, int64_t{4} << 20,
                                     0.320e12, 1.2e12,      4.05e12, 0.127e12, 32.5e12, 0}},
    {"sm_80", "A100 SXM 80 GB",     {108, 80, 163 << 10, 164 << 10, 1 << 10,   2048, 32, int64_t{40} << 20,
                                     2.039e12, 4.5e12,      9.75e12, 4.85e12, 156e12, 78e12}},
    {"sm_86", "GeForce RTX 3090",   {82,  86,  99 << 10, 100 << 10, 1 << 10,   1536, 16, int64_t{6} << 20,
                                     0.936e12, 2.4e12,      17.8e12, 0.278e12, 35.5e12, 17.8e12}},
    {"sm_89", "GeForce RTX 4090",   {128, 89,  99 << 10, 100 << 10, 1 << 10,   1536, 24, int64_t{72} << 20,
                                     1.008e12, 5.0e12,      41.3e12, 0.645e12, 82.6e12, 41.3e12}},
    {"sm_90", "H100 SXM 80 GB",     {132, 90, 227 << 10, 228 << 10, 1 << 10,   2048, 32, int64_t{50} << 20,
                                     3.35e12, 5.5e12,       33.5e12, 16.7e12, 307e12, 153e12}},
    {"sm_100", "B200",              {148, 100, 227 << 10, 228 << 10, 1 << 10,  2048, 32, int64_t{126} << 20,
                                     8.0e12, 9.0e12,        37.5e12, 18.5e12, 344e12, 172e12}},
    {"sm_120", "GeForce RTX 5090",  {170, 120, 99 << 10, 100 << 10, 1 << 10,   1536, 24, int64_t{96} << 20,
                                     1.792e12, 6.5e12,      52.4e12, 0.82e12, 105e12, 52.4e12}},
};
// clang-format on

// Wavefronts of shared memory a second, 128 bytes each: one a clock and multiprocessor. The clock is told from fma_f32;
// sm_75 and sm_80 have 64 lanes a multiprocessor, the others 128.
constexpr double shared_wavefronts(const DeviceLimits& device) {
  return device.fma_f32 / (device.capability <= 80 ? 64 : 128);
}

// A GPU that is no entry of the table has the rates of the newest entry that is not newer than it, by its number of
// multiprocessors. The caller puts what it knows better over it.
constexpr DeviceLimits limits_of(int64_t capability, int64_t multiprocessors) {
  const Gpu* closest = kGpus;
  for (const Gpu& gpu : kGpus) {
    if (gpu.limits.capability <= capability) closest = &gpu;
  }
  DeviceLimits limits = closest->limits;
  const double scale = static_cast<double>(multiprocessors) / static_cast<double>(limits.multiprocessors);
  limits.capability = capability;
  limits.multiprocessors = multiprocessors;
  limits.bandwidth *= scale;
  limits.l2_bandwidth *= scale;
  limits.fma_f32 *= scale;
  limits.fma_f64 *= scale;
  limits.mma_f16 *= scale;
  limits.mma_tf32 *= scale;
  return limits;
}

}  // namespace dsconv
