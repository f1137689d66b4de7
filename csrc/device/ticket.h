// Which block is the last: for a sum over blocks within one launch.
#pragma once

namespace device {

// True in every thread of the block that calls this last; what the others wrote before they called is then visible to it.
// Every block calls it once. `counter` is zero before the first launch and zero again after each.
DEVICE bool is_last_block(Global<unsigned> counter, int blocks, Where at = Where::current()) {
  SHARED_ARRAY(int, last, 1);
  block_barrier(at);  // the block has written all it has to
  if (thread_id() == 0) {
    device_fence(at);
    last[0] = atomic_wrap(counter, static_cast<unsigned>(blocks) - 1, at) == static_cast<unsigned>(blocks) - 1;
    device_fence(at);  // what comes after is not read before the ticket is drawn
  }
  block_barrier(at);
  const int value = last[0];
  return value != 0;
}

}  // namespace device
