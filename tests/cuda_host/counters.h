// Counts the memory accesses of kernels, warp instruction by warp instruction: 32-byte sectors of global memory, and
// wavefronts of shared memory. Only in builds with CUDA_HOST_COUNT (build_counter() of build.py).
//
// How accesses are seen: kernels are compiled with -fsanitize=thread and -fsanitize-coverage=trace-pc, and the
// functions that these call, for every access of memory that is not the thread's own and at the start of every basic
// block, are defined in counters.cpp. The kernels' source is the one that is shipped.
//
// How a warp instruction is put together again: lanes run one after another, so each access gets a key, its place in
// the code and the iteration of every loop around it. Accesses of a warp's lanes with equal keys between two barriers
// are one instruction, and a lane that skips it, or loops less often, has none. A loop is known by a jump back to its
// first block; where it ends is learned from a first run of a block that is not counted.
//
// What is counted of one instruction:
//   sectors     distinct 32-byte sectors of its lanes, in one of the tensors that count_tensor() named
//   wavefronts  of shared memory, 32 banks of 4 bytes: lanes in groups of 32, 16 or 8 for accesses of up to 4, 8 or 16
//               bytes; a group takes as many as its fullest bank has distinct words. Without conflicts: one a group.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace cuda_host {

// Of one tensor in one kernel, over the blocks counted.
struct TensorTraffic {
  std::string name;
  uint64_t read_sectors = 0, written_sectors = 0;
  uint64_t block_sectors = 0;  // distinct ones of each block, read or written
  uint64_t requests = 0;       // warp instructions
};

struct KernelTraffic {
  std::string symbol;
  uint64_t blocks = 0, counted_blocks = 0;
  uint64_t threads = 0, dynamic_shared = 0;
  std::vector<TensorTraffic> tensors;
  uint64_t load_wavefronts = 0, free_load_wavefronts = 0;
  uint64_t store_wavefronts = 0, free_store_wavefronts = 0;
};

// The tensors of the launches to come, by address; an access elsewhere is the thread's own (stack, parameters).
void count_tensor(std::string name, const void* data, uint64_t bytes);
void forget_tensors();

// Of each launch to come this many blocks are run and counted, drawn evenly from the grid; 0: launches are only noted.
void count_blocks(uint64_t most);

// The launches since the last call, in their order.
std::vector<KernelTraffic> take_traffic();

// Called by the engine.
void count_shared(const void* begin, uint64_t bytes);
void count_launch(const void* kernel, uint64_t blocks, uint64_t threads, uint64_t dynamic_shared);
std::vector<uint64_t> blocks_to_run(uint64_t blocks);  // the first of them twice: to learn from it
void count_block_start(bool counted);
void count_lane(int thread);  // that runs from now on; -1: none
void count_barrier();         // all threads have arrived, or the block has ended

// An asynchronous copy, in place of the emulation's own form of it.
void count_copy(void* dst, const void* src, int bytes, int valid);  // and makes the copy

}  // namespace cuda_host
