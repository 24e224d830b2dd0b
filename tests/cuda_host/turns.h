// In which order the blocks of a grid and the threads of a block take their turns.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <utility>
#include <vector>

#include "host_runtime.h"

namespace cuda_host {

class Turns {
 public:
  // What the environment variable CUDA_HOST_ORDER says.
  Turns() {
    const char* const text = std::getenv("CUDA_HOST_ORDER");
    if (text == nullptr || std::strcmp(text, "forward") == 0) return;
    if (std::strcmp(text, "reverse") == 0) {
      choose(ThreadOrder::reverse, 0);
    } else if (std::strcmp(text, "random") == 0 || std::strncmp(text, "random:", 7) == 0) {
      choose(ThreadOrder::random, text[6] == ':' ? std::strtoull(text + 7, nullptr, 10) : 0);
    } else {
      std::fprintf(stderr, "CUDA_HOST_ORDER must be forward, reverse or random[:seed], got %s\n", text);
      std::abort();
    }
  }

  void choose(ThreadOrder order, uint64_t seed) {
    order_ = order;
    random_state_ = seed * 0x9e3779b97f4a7c15u + 1;
  }

  void begin_launch(uint64_t blocks, int threads) {
    fill(blocks_, order_ == ThreadOrder::random ? blocks : 0);
    fill(threads_, static_cast<uint64_t>(threads));
    if (order_ == ThreadOrder::random) shuffle(blocks_);
    block_count_ = blocks;
  }

  uint64_t block(uint64_t turn) const {
    if (order_ == ThreadOrder::random) return blocks_[turn];
    return order_ == ThreadOrder::reverse ? block_count_ - 1 - turn : turn;
  }

  // Every thread once; in the random order, another one each time.
  const std::vector<int>& threads() {
    if (order_ == ThreadOrder::random) shuffle(threads_);
    return threads_;
  }

 private:
  template <typename T>
  void fill(std::vector<T>& values, uint64_t count) {
    values.resize(count);
    if (order_ == ThreadOrder::reverse) {
      std::iota(values.rbegin(), values.rend(), T(0));
    } else {
      std::iota(values.begin(), values.end(), T(0));
    }
  }

  template <typename T>
  void shuffle(std::vector<T>& values) {
    for (uint64_t i = values.size(); i > 1; --i) std::swap(values[i - 1], values[random_below(i)]);
  }

  uint64_t random_below(uint64_t bound) {  // xorshift
    random_state_ ^= random_state_ << 13;
    random_state_ ^= random_state_ >> 7;
    random_state_ ^= random_state_ << 17;
    return random_state_ % bound;
  }

  ThreadOrder order_ = ThreadOrder::forward;
  uint64_t random_state_ = 1;
  uint64_t block_count_ = 0;
  std::vector<uint64_t> blocks_;
  std::vector<int> threads_;
};

}  // namespace cuda_host
