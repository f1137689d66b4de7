// Tracked memory: who wrote and who read each byte, and whether accesses of two threads are ordered.
#pragma once

#include <map>
#include <memory>
#include <unordered_map>
#include <vector>

#include "report.h"

namespace device::host {

// Whoever accesses memory has a slot in the vector clocks of its block: its threads first, then up to kAgents asynchronous agents
// (engine.h). What thread t has in flight and will know itself when it waits is marked kInFlight + t, which no clock covers. What
// four agents do together, whose slots follow each other from s on, is marked kOfFour + s: it is over when that is known of each.
constexpr int kAgents = 128, kOfFour = 2048, kInFlight = 4096;

// One access, packed: clock 22 bits, slot 13, block + 1 28, atomic 1. key 0 is none.
struct Access {
  uint64_t key = 0;
  Where at;
  uint32_t clock() const { return key & 0x3fffff; }
  int thread() const { return key >> 22 & 0x1fff; }
  int64_t block() const { return static_cast<int64_t>(key >> 35 & 0xfffffff) - 1; }
  bool atomic() const { return key >> 63; }
  bool by_same_thread(const Access& other) const { return (key << 1 >> 23) == (other.key << 1 >> 23); }
};

inline Access make_access(int64_t block, int thread, uint32_t clock, bool atomic, const Where& at) {
  return {static_cast<uint64_t>(atomic) << 63 | static_cast<uint64_t>(block + 1) << 35 |
              static_cast<uint64_t>(thread) << 22 | clock,
          at};
}

// The last write of a byte, and the last reads since by two different threads.
struct Cell {
  Access writer, readers[2];
};

enum class Mode {
  input,     // only read
  both,      // holds values; read and written
  output,    // holds nothing yet: read only after it was written
};

// A buffer of global memory, or an array of a block's shared memory.
struct Region {
  std::string name;
  bool shared = false;
  Mode mode = Mode::output;
  uint8_t* begin = nullptr;
  size_t bytes = 0;
  std::unique_ptr<uint8_t[]> storage;  // of shared memory
  int64_t owner = -1;                  // the block whose shared memory it is
  std::vector<Cell> cells;             // empty for inputs
  std::vector<bool> written;           // of outputs

  void track() {
    if (mode != Mode::input) cells.assign(bytes, Cell());
    if (mode == Mode::output && written.empty()) written.assign(bytes, false);
  }
};

// How a block's accesses are ordered for others: what its threads had done at each of its fences, and which fences of other
// blocks it has seen through atomics. Kept to the end of the launch.
struct Ledger {
  std::vector<std::vector<uint32_t>> fences;     // per fence, for each slot: its clock up to which all is visible
  std::unordered_map<int64_t, size_t> seen;      // block -> how many of its fences
  std::vector<std::vector<uint32_t>> proxied;    // per fence: the same, up to which the asynchronous proxy sees it too
  std::unordered_map<int64_t, size_t> seen_proxied;  // what had been seen at this block's last proxy fence
  size_t phase_proxied = 0;                          // and how many of its cluster's barriers were over
};

}  // namespace device::host
