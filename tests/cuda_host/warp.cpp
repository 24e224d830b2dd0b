// Warp primitives: __syncwarp, shuffles, votes, and the collective step of the matrix instructions. Each waits until
// every lane that its mask names has come to the same one.

#include "engine_state.h"

namespace cuda_host {

const char* name_of(WarpOp op) {
  switch (op) {
    case WarpOp::sync:
      return "__syncwarp";
    case WarpOp::ballot:
      return "__ballot_sync";
    case WarpOp::ldmatrix:
      return "ldmatrix";
    case WarpOp::mma:
      return "mma.sync";
    default:
      return "__shfl_sync";
  }
}

namespace {

uint64_t meet(WarpOp op, unsigned mask, uint64_t bits, int lane_argument, int width, Site site, WarpCompute compute) {
  Thread& t = *engine.current;
  const int first = t.number / warpSize * warpSize, lane = t.number % warpSize;
  Warp& w = engine.warps[t.number / warpSize];
  const unsigned self = 1u << lane;
  const auto refuse = [&](const char* why, unsigned lanes) {
    report("thread %d, %s(mask %#x) at %s:%d: %s (lanes %#x)", t.number, name_of(op), mask, site.file, site.line, why,
           lanes);
    stop_thread();
  };
  if ((mask & self) == 0) refuse("the mask does not name the calling lane", self);
  if ((mask & ~w.exists) != 0) refuse("the mask names lanes that the block does not have", mask & ~w.exists);
  if ((mask & w.done) != 0) refuse("the mask names lanes that have returned", mask & w.done);
  if (width < 1 || width > warpSize || (width & (width - 1)) != 0) refuse("the width is not a power of two to 32", 0);

  const int segment = lane & ~(width - 1), last = segment + width - 1;
  t.source_lane = lane;
  switch (op) {
    case WarpOp::shuffle:
      t.source_lane = segment + (lane_argument & (width - 1));
      break;
    case WarpOp::shuffle_up:
      if (lane - lane_argument >= segment) t.source_lane = lane - lane_argument;
      break;
    case WarpOp::shuffle_down:
      if (lane + lane_argument <= last) t.source_lane = lane + lane_argument;
      break;
    case WarpOp::shuffle_xor:
      if ((lane ^ lane_argument) <= last) t.source_lane = lane ^ lane_argument;
      break;
    default:
      break;
  }
  if ((mask >> t.source_lane & 1) == 0) refuse("reads a lane that the mask does not name", 1u << t.source_lane);

  t.op = op;
  t.mask = mask;
  t.bits = bits;
  t.site = site;
  w.arrived |= self;
  // Lanes that wait for each other in __syncwarp share one object: that of the first of them to arrive.
  if (op == WarpOp::sync) {
    t.sync_object = nullptr;
    for (int other = 0; other < warpSize; ++other) {
      if ((mask & w.arrived & ~self) >> other & 1) t.sync_object = engine.threads[first + other].sync_object;
    }
    if (t.sync_object == nullptr) t.sync_object = &w.sync_objects[w.sync_count++ % kWarpSyncObjects];
    DECLARE_RELEASE(const_cast<char*>(t.sync_object));
  } else {
    t.sync_object = nullptr;
  }

  if ((w.arrived & mask) != mask) {
    wait_as(State::at_warp_op, site);
  } else {
    uint64_t results[warpSize];
    void* operands[warpSize];
    uint64_t ballot = 0;
    for (int other = 0; other < warpSize; ++other) {
      if ((mask >> other & 1) == 0) continue;
      const Thread& o = engine.threads[first + other];
      if (o.op != op || o.mask != mask || !same_site(o.site, site)) {
        report("thread %d, %s(mask %#x) at %s:%d: lane %d is in %s(mask %#x) at %s:%d", t.number, name_of(op), mask,
               site.file, site.line, other, name_of(o.op), o.mask, o.site.file, o.site.line);
        stop_thread();
      }
      results[other] = engine.threads[first + o.source_lane].bits;
      operands[other] = reinterpret_cast<void*>(static_cast<std::uintptr_t>(o.bits));
      ballot |= (o.bits & 1) << other;
    }
    if (compute != nullptr) compute(operands);
    for (int other = 0; other < warpSize; ++other) {
      if ((mask >> other & 1) == 0) continue;
      Thread& o = engine.threads[first + other];
      o.bits = op == WarpOp::ballot ? ballot : results[other];
      o.state = State::ready;
    }
    w.arrived &= ~mask;
  }
  if (op == WarpOp::sync) DECLARE_ACQUIRE(const_cast<char*>(t.sync_object));
  return t.bits;
}

}  // namespace

uint64_t warp_exchange(WarpOp op, unsigned mask, uint64_t bits, int lane_argument, int width, Site site) {
  return meet(op, mask, bits, lane_argument, width, site, nullptr);
}

void warp_collective(WarpOp op, void* operands, WarpCompute compute, Site site) {
  meet(op, 0xffffffffu, reinterpret_cast<std::uintptr_t>(operands), 0, warpSize, site, compute);
}

}  // namespace cuda_host
