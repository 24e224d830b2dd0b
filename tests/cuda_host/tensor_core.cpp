// The matrix instructions of a warp: which lane holds which element (csrc/cuda/ptx.cuh says it in words), and products
// in single precision, added in the order of the columns. A GPU adds in another order, and with other roundings, which
// nobody documents; all are those of single precision.

#include "engine_state.h"

namespace cuda_host {

namespace {

float float_of_f16(uint32_t bits) {
  const uint32_t sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 0x1fu, fraction = bits & 0x3ffu;
  if (exponent == 0) {
    const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
    return sign != 0 ? -magnitude : magnitude;
  }
  return bits_as<float>(sign | (exponent == 0x1f ? 0xffu : exponent + 112) << 23 | fraction << 13);
}

float float_of_bf16(uint32_t bits) { return bits_as<float>(bits << 16); }

// Element `column` of the `columns` that a row of registers holds: two 16-bit ones or one float a register.
float element(MmaType type, uint32_t word, int half) {
  if (type == MmaType::tf32) return bits_as<float>(word & ~0x1fffu);
  const uint32_t bits = half != 0 ? word >> 16 : word & 0xffffu;
  return type == MmaType::bf16 ? float_of_bf16(bits) : float_of_f16(bits);
}

void compute_mma(void* const (&lanes)[warpSize]) {
  const auto lane_of = [&](int lane) -> MmaOperands& { return *static_cast<MmaOperands*>(lanes[lane]); };
  const MmaType type = lane_of(0).type;
  const int per_word = type == MmaType::tf32 ? 1 : 2, depth = type == MmaType::f16_k8 ? 8 : 8 * per_word;
  float a[16][16] = {}, b[16][8] = {}, d[16][8];
  for (int lane = 0; lane < warpSize; ++lane) {
    const MmaOperands& o = lane_of(lane);
    const int g = lane / 4, t = lane % 4;
    for (int half = 0; half < per_word; ++half) {
      const int near = t * per_word + half, far = near + 4 * per_word;
      a[g][near] = element(type, o.a[0], half);
      a[g + 8][near] = element(type, o.a[1], half);
      b[near][g] = element(type, o.b[0], half);
      if (far >= depth) continue;
      a[g][far] = element(type, o.a[2], half);
      a[g + 8][far] = element(type, o.a[3], half);
      b[far][g] = element(type, o.b[1], half);
    }
    for (int i = 0; i < 4; ++i) d[g + i / 2 * 8][2 * t + i % 2] = o.d[i];
  }
  for (int m = 0; m < 16; ++m) {
    for (int k = 0; k < depth; ++k) {
      for (int n = 0; n < 8; ++n) d[m][n] += a[m][k] * b[k][n];
    }
  }
  for (int lane = 0; lane < warpSize; ++lane) {
    for (int i = 0; i < 4; ++i) lane_of(lane).d[i] = d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
  }
}

void compute_rows(void* const (&lanes)[warpSize]) {
  const auto lane_of = [&](int lane) -> MatrixRow& { return *static_cast<MatrixRow*>(lanes[lane]); };
  uint16_t rows[warpSize][8];
  for (int lane = 0; lane < warpSize; ++lane) std::memcpy(rows[lane], lane_of(lane).words, sizeof rows[lane]);
  for (int lane = 0; lane < warpSize; ++lane) {
    MatrixRow& o = lane_of(lane);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      const uint16_t low = o.transposed ? rows[8 * i + 2 * t][g] : rows[8 * i + g][2 * t];
      const uint16_t high = o.transposed ? rows[8 * i + 2 * t + 1][g] : rows[8 * i + g][2 * t + 1];
      o.words[i] = low | static_cast<uint32_t>(high) << 16;
    }
  }
}

}  // namespace

void check_row_address(const void* address) {
  if (reinterpret_cast<std::uintptr_t>(address) % 16 == 0) return;
  report("thread %d: ldmatrix of a row whose address is no multiple of 16", engine.current->number);
  stop_thread();
}

void exchange_rows(MatrixRow& lane, Site site) { warp_collective(WarpOp::ldmatrix, &lane, compute_rows, site); }

void multiply_fragments(MmaOperands& lane, Site site) { warp_collective(WarpOp::mma, &lane, compute_mma, site); }

}  // namespace cuda_host
