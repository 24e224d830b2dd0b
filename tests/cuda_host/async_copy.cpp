// The books of cp.async: what each thread has issued, in which group, and what a wait lets land. The copies themselves
// are made in host_device.h, as the thread's own accesses.

#include "engine_state.h"

namespace cuda_host {

void queue_copy(AsyncCopy copy) {
  Thread& t = *engine.current;
  const auto misaligned = [&](const void* p) {
    return reinterpret_cast<std::uintptr_t>(p) % static_cast<unsigned>(copy.bytes) != 0;
  };
  if (misaligned(copy.dst) || misaligned(copy.src)) {
    report("thread %d: cp_async of %d bytes with an address that is no multiple of %d", t.number, copy.bytes,
           copy.bytes);
    stop_thread();
  }
  if (copy.valid < 0 || copy.valid > copy.bytes || copy.valid % 2 != 0) {
    report("thread %d: cp_async of %d bytes with %d of them valid", t.number, copy.bytes, copy.valid);
    stop_thread();
  }
  if (t.issued - t.landed == kMaxCopiesInFlight) {
    report("thread %d has %llu asynchronous copies in flight; the emulation holds no more", t.number,
           static_cast<unsigned long long>(kMaxCopiesInFlight));
    stop_thread();
  }
  copy.group = t.copy_group;
  t.copies[t.issued++ % kMaxCopiesInFlight] = copy;
}

void cp_async_commit() { ++engine.current->copy_group; }

bool next_landing(int groups_left_in_flight, AsyncCopy* copy) {
  Thread& t = *engine.current;
  if (t.landed == t.issued) return false;
  const AsyncCopy& oldest = t.copies[t.landed % kMaxCopiesInFlight];
  if (oldest.group + static_cast<uint64_t>(groups_left_in_flight) >= t.copy_group) return false;
  *copy = oldest;
  ++t.landed;
  return true;
}

}  // namespace cuda_host
