// What a launch is predicted to cost: the largest of four times, each with its assumption.
//
//   DRAM         each tensor crosses once: L2 holds what blocks share                       dram_bytes / bandwidth
//   L2           what blocks load and store, taps from L1 or shared memory                  l2_bytes / l2_bandwidth
//   shared       shared memory, where counted, on the multiprocessor with the most blocks    its wavefronts / its clock
//   arithmetic   on that multiprocessor, tiles padded                                     its multiply-adds / its rate
//
//   seconds = kLaunchSeconds a launch + the largest. Latency, bank conflicts and the instructions beside the
//   multiply-adds are left out: a prediction puts alternatives in order and is a floor of the time.
#pragma once

#include <cstdint>

#include "cuda_device.h"

namespace dsconv {

constexpr double kLaunchSeconds = 2e-6;  // of a kernel behind another one in its stream: an assumption

// One launch, or several alike. The sizes of a tile are those of its product, rows x columns, `depth` of the
// contraction at a time; zero where there is none. `stages`: chunks of the contraction that shared memory holds.
struct KernelCost {
  const char* name = "";
  int64_t tile_rows = 0, tile_columns = 0, tile_depth = 0, stages = 0;
  int64_t launches = 1, blocks = 0, threads = 0, shared_bytes = 0;  // blocks: of all launches
  int64_t bounded_blocks = 0;  // blocks a multiprocessor that __launch_bounds__ leaves registers for
  double multiply_adds = 0;    // of all blocks
  double rate = 0;             // of the device, multiply-adds a second
  double wavefronts = 0;       // of shared memory, of all blocks
  int64_t dram_bytes = 0, l2_bytes = 0;
};

struct Prediction {
  int64_t blocks_per_multiprocessor;
  double waves;  // not rounded
  double dram_seconds, l2_seconds, shared_seconds, arithmetic_seconds, seconds;
};

constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

constexpr int64_t blocks_per_multiprocessor(const KernelCost& k, const DeviceLimits& device) {
  if (k.shared_bytes > device.shared_per_block) return 0;
  int64_t blocks = smaller(device.blocks_per_multiprocessor, device.threads_per_multiprocessor / k.threads);
  blocks = smaller(blocks, k.bounded_blocks);
  const int64_t shared = k.shared_bytes + device.shared_reserved;
  return shared > 0 ? smaller(blocks, device.shared_per_multiprocessor / shared) : blocks;
}

constexpr Prediction predict(const KernelCost& k, const DeviceLimits& device) {
  Prediction result{};
  result.blocks_per_multiprocessor = blocks_per_multiprocessor(k, device);
  if (result.blocks_per_multiprocessor == 0 || k.blocks == 0) return result;
  const double blocks = static_cast<double>(k.blocks), multiprocessors = static_cast<double>(device.multiprocessors);
  result.waves = blocks / (static_cast<double>(result.blocks_per_multiprocessor) * multiprocessors);
  const int64_t wave = k.launches * device.multiprocessors;
  const double most_blocks = static_cast<double>((k.blocks + wave - 1) / wave * k.launches);
  result.dram_seconds = static_cast<double>(k.dram_bytes) / device.bandwidth;
  result.l2_seconds = static_cast<double>(k.l2_bytes) / device.l2_bandwidth;
  if (k.rate > 0) result.arithmetic_seconds = most_blocks * (k.multiply_adds / blocks) / (k.rate / multiprocessors);
  result.shared_seconds = most_blocks * (k.wavefronts / blocks) / (shared_wavefronts(device) / multiprocessors);
  double most = result.dram_seconds;
  if (result.l2_seconds > most) most = result.l2_seconds;
  if (result.shared_seconds > most) most = result.shared_seconds;
  if (result.arithmetic_seconds > most) most = result.arithmetic_seconds;
  result.seconds = static_cast<double>(k.launches) * kLaunchSeconds + most;
  return result;
}

}  // namespace dsconv
