// wgmma on the host. A product is known when all four warps of a warpgroup have issued it, and is computed then or later
// (engine.h).
//
// Its operands in shared memory are read by the four warps' agents from the issue on; what is wrong with that is found by marks.
// A warp's wait says of its own reads alone that they are over (PTX: wgmma.wait_group waits for groups of the executing threads),
// and each warp may read all of an operand: who writes there must know of the waits of all four.
// The registers are watched too: from the issue to the wait they hold a pattern, so that whoever reads them too early computes
// with NaN, whoever writes them is found at the wait, and neither depends on when the product is computed. What they held at the
// last wgmma_fence is remembered, so that one that is missing is found at the issue.
#pragma once

#include "async.h"

namespace device {

template <class T>
inline uint32_t shared_address(Shared<T> p) {
  return static_cast<uint32_t>(reinterpret_cast<const uint8_t*>(p.address()) - p.region()->begin);
}

constexpr bool kWgmma = true;
inline bool has_wgmma() { return true; }

template <class T>
inline uint32_t pack_rounded(float low, float high) {
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}

namespace host {

constexpr uint32_t kHeld = 0x7fc0dead;  // what registers in flight hold: a NaN

// One product as it was issued.
struct Instruction {
  int n = 0;
  bool bf16 = false, accumulate = false, a_shared = false;
  Major a_major = Major::k, b_major = Major::k;
  uint64_t a = 0, b = 0;
  Region *a_region = nullptr, *b_region = nullptr;
  uint32_t group = 0;
  Where at;

  bool same_as(const Instruction& other) const {
    return n == other.n && bf16 == other.bf16 && accumulate == other.accumulate && a_shared == other.a_shared &&
           a_major == other.a_major && b_major == other.b_major && a == other.a && b == other.b && a_region == other.a_region &&
           b_region == other.b_region && group == other.group && same_place(at, other.at);
  }

  std::string text() const {
    const auto operand = [](uint64_t descriptor, Major major) {
      const MatrixLayout m = matrix_layout(descriptor);
      return format("%s-major at %u, leading %u, stride %u", major == Major::k ? "K" : "MN", m.address, m.leading, m.stride);
    };
    return format("m64n%dk16 (A %s; B %s) of group %u at %s", n, a_shared ? operand(a, a_major).c_str() : "in registers",
                  operand(b, b_major).c_str(), group, place(at).c_str());
  }
};

struct Product {
  Instruction what;
  uint32_t warps = 0;  // which have issued it
  int issued = 0;      // by so many threads
  std::vector<uint32_t> fragments;           // of A, 4 of each thread
  std::vector<uint32_t*> accumulators;       // of each thread
};

// Registers of a thread in flight.
struct Held {
  bool accumulator;
  std::vector<uint32_t> values;  // what they will hold
  uint64_t last;                 // the number of the last product that uses them, from 1
  Where at;
};

struct Fenced {
  const uint32_t* begin;
  std::vector<uint32_t> values;
};

// What a thread of a warpgroup has issued.
struct Issuer {
  uint64_t products = 0;
  std::vector<uint64_t> groups;  // committed: products up to each one's end
  std::map<uint32_t*, Held> held;
  std::vector<Fenced> fenced;
};

struct Warpgroup : Chain {
  int id = 0, slot = 0;  // slot: of the first warp's agent; those of the others follow
  Issuer issuers[128];
  std::deque<Product> products;  // not computed yet
  uint64_t computed = 0;

  std::string text() const override {
    for (const Product& p : products) {
      if (p.issued < 128) return format(" (%d of its 128 threads have issued %s)", p.issued, p.what.text().c_str());
    }
    return "";
  }

  void end(const Block& block) const override {
    for (int t = 0; t < 128; ++t) {
      for (const auto& [registers, held] : issuers[t].held) {
        mistake(block, 128 * id + t, held.at, "the block has ended and no wgmma_wait names the registers of this product");
      }
    }
  }
};

inline Warpgroup& my_warpgroup(const Where& at) {
  const int id = machine.thread->id / 128;
  auto& chains = engine.mine().chains;
  for (auto& chain : chains) {
    if (auto* found = dynamic_cast<Warpgroup*>(chain.get()); found && found->id == id) return *found;
  }
  if (128 * (id + 1) > machine.block_threads) {
    fail_with(at, format("wgmma: thread %d is in no whole warpgroup of 128 threads", machine.thread->id));
  }
  auto made = std::make_unique<Warpgroup>();
  made->id = id;
  for (int warp = 0; warp < 4; ++warp) made->slot = make_agent(format("a product of warpgroup %d", id), at) - warp;
  chains.push_back(std::move(made));
  return static_cast<Warpgroup&>(*chains.back());
}

inline Issuer& my_issuer(const Where& at) { return my_warpgroup(at).issuers[machine.thread->id % 128]; }

// Checks an operand in shared memory and marks what is read of it: elements [first, last) of M or N.
inline void mark_operand(const char* name, uint64_t descriptor, Region* region, Major major, int first, int last, int slot,
                         uint32_t clock, const Where& at) {
  const MatrixLayout layout = matrix_layout(descriptor);
  const uint32_t width = panel_bytes(layout.swizzle);
  if (layout.base_offset || (layout.swizzle != Swizzle::none && layout.address / width % 8)) {
    fail_with(at, format("wgmma: operand %s begins at byte %u of '%s': in row %u of the swizzle's pattern, not in its first",
                         name, layout.address, region->name.c_str(), layout.address / width % 8));
  }
  if (layout.address % width && (major == Major::mn || layout.address % width + 32 > width)) {
    fail_with(at, format("wgmma: operand %s begins at byte %u of '%s' and crosses the border of a panel, %u bytes wide", name,
                         layout.address, region->name.c_str(), width));
  }
  const bool k_major = major == Major::k;  // eight elements follow each other along K or along M or N
  for (int mn = first; mn < last; mn += k_major ? 1 : 8) {
    for (int k = 0; k < 16; k += k_major ? 8 : 1) {
      mark(region->begin + matrix_byte(layout, major, mn, k), region, 16, 16, Use::read, kOfFour + slot, clock, at);
    }
  }
}

inline float element(bool bf, uint16_t bits) { return bf ? to_float(bf16{bits}) : to_float(fp16{bits}); }

inline float operand_element(bool bf, const MatrixLayout& layout, Major major, const Region* region, int mn, int k) {
  uint16_t bits;
  std::memcpy(&bits, region->begin + matrix_byte(layout, major, mn, k), 2);
  return element(bf, bits);
}

// The first of the products: sums of 16, added to the accumulators, in fp32. The hardware adds in an order of its own.
__attribute__((optimize("O3"))) inline void compute(Warpgroup& warpgroup) {
  const Product product = std::move(warpgroup.products.front());
  warpgroup.products.pop_front();
  ++warpgroup.computed;
  const Instruction& what = product.what;
  float a[64][16], b[16][256], c[64][256] = {};
  if (what.a_shared) {
    const MatrixLayout layout = matrix_layout(what.a);
    for (int m = 0; m < 64; ++m) {
      for (int k = 0; k < 16; ++k) a[m][k] = operand_element(what.bf16, layout, what.a_major, what.a_region, m, k);
    }
  } else {
    for (int t = 0; t < 128; ++t) {
      for (int i = 0; i < 8; ++i) {
        const Place place = fragment_place(t, i);
        a[place.row][place.column] = element(what.bf16, static_cast<uint16_t>(product.fragments[4 * t + i / 2] >> i % 2 * 16));
      }
    }
  }
  const MatrixLayout layout = matrix_layout(what.b);
  for (int n = 0; n < what.n; ++n) {
    for (int k = 0; k < 16; ++k) b[k][n] = operand_element(what.bf16, layout, what.b_major, what.b_region, n, k);
  }
  for (int m = 0; m < 64; ++m) {
    for (int k = 0; k < 16; ++k) {
      for (int n = 0; n < what.n; ++n) c[m][n] += a[m][k] * b[k][n];
    }
  }
  for (int t = 0; t < 128; ++t) {
    std::vector<uint32_t>& d = warpgroup.issuers[t].held.at(product.accumulators[t]).values;
    for (int i = 0; i < what.n / 2; ++i) {
      const Place place = fragment_place(t, i);
      d[i] = float_bits((what.accumulate ? bits_float(d[i]) : 0.0f) + c[place.row][place.column]);
    }
  }
}

inline void check_untouched(const uint32_t* registers, const Held& held, const Where& at) {
  for (size_t i = 0; i < held.values.size(); ++i) {
    if (registers[i] != kHeld) {
      fail_with(at, format("wgmma: element %zu of %s was written between the product at %s and a wait for it", i,
                           held.accumulator ? "an accumulator" : "a fragment of A", place(held.at).c_str()));
    }
  }
}

// From now on the registers are the product's. What they hold must have stood there at the last wgmma_fence.
inline Held& hold(Issuer& issuer, uint32_t* registers, int count, bool accumulator, const Where& at) {
  const auto held = issuer.held.find(registers);
  const char* name = accumulator ? "the accumulator" : "the fragment of A";
  if (held != issuer.held.end()) {
    check_untouched(registers, held->second, at);
    if (static_cast<int>(held->second.values.size()) != count || held->second.accumulator != accumulator) {
      fail_with(at, format("wgmma: %s is in flight as something else, since %s", name, place(held->second.at).c_str()));
    }
    held->second.last = issuer.products, held->second.at = at;
    return held->second;
  }
  const Fenced* fenced = nullptr;
  for (const Fenced& f : issuer.fenced) {
    if (f.begin <= registers && registers + count <= f.begin + f.values.size()) fenced = &f;
  }
  if (!fenced) fail_with(at, format("wgmma: no wgmma_fence names %s before its first product, or since it was waited for", name));
  for (int i = 0; i < count; ++i) {
    if (fenced->values[registers - fenced->begin + i] != registers[i]) {
      fail_with(at, format("wgmma: element %d of %s was written after the last wgmma_fence that names it", i, name));
    }
  }
  if (accumulator) issuer.fenced.erase(issuer.fenced.begin() + (fenced - issuer.fenced.data()));
  Held& made = issuer.held[registers];
  made = {accumulator, std::vector<uint32_t>(registers, registers + count), issuer.products, at};
  std::fill(registers, registers + count, kHeld);
  return made;
}

inline void issue(float* d, const uint32_t* a, Instruction what, const Where& at) {
  Warpgroup& warpgroup = my_warpgroup(at);
  const int t = machine.thread->id % 128, warp = t / 32;
  Issuer& issuer = warpgroup.issuers[t];
  what.group = static_cast<uint32_t>(issuer.groups.size()) + 1, what.at = at;
  const uint64_t number = issuer.products++;
  if (number - warpgroup.computed == warpgroup.products.size()) {
    warpgroup.products.push_back({what, 0, 0, std::vector<uint32_t>(512), std::vector<uint32_t*>(128)});
  }
  Product& product = warpgroup.products[number - warpgroup.computed];
  const Instruction& first = product.what;
  if (!what.same_as(first)) {
    fail_with(at, format("wgmma: the warps of a warpgroup must issue the same products: number %llu of this thread is %s, "
                         "of another %s",
                         static_cast<unsigned long long>(number), what.text().c_str(), first.text().c_str()));
  }
  if (!(product.warps >> warp & 1)) {
    product.warps |= 1u << warp;
    if (what.a_shared) {
      mark_operand("A", what.a, what.a_region, what.a_major, 16 * warp, 16 * warp + 16, warpgroup.slot, what.group, at);
    }
    mark_operand("B", what.b, what.b_region, what.b_major, 0, what.n, warpgroup.slot, what.group, at);
  }
  if (a) {
    const Held& held = hold(issuer, const_cast<uint32_t*>(a), 4, false, at);
    std::copy(held.values.begin(), held.values.end(), product.fragments.begin() + 4 * t);
  }
  product.accumulators[t] = reinterpret_cast<uint32_t*>(d);
  hold(issuer, product.accumulators[t], what.n / 2, true, at);
  if (++product.issued == 128) later(Unit::product, &warpgroup, at, [&warpgroup] { compute(warpgroup); });
}

}  // namespace host

inline void wgmma_commit(Where at = Where::current()) {
  host::Issuer& issuer = host::my_issuer(at);
  issuer.groups.push_back(issuer.products);
}

template <class T, int M>
inline void wgmma_fence_registers(T (&registers)[M], const Where& at) {
  static_assert(sizeof(T) == 4, "registers are float or uint32_t");
  host::Issuer& issuer = host::my_issuer(at);
  const auto* begin = reinterpret_cast<const uint32_t*>(registers);
  std::erase_if(issuer.fenced, [&](const host::Fenced& f) { return f.begin < begin + M && begin < f.begin + f.values.size(); });
  issuer.fenced.push_back({begin, std::vector<uint32_t>(begin, begin + M)});
}
inline void wgmma_fence_all() {}

// Until all groups of this thread but the last N are done. Its fragments are free then.
template <int N>
inline void wgmma_wait_all(const Where& at) {
  using namespace host;
  Warpgroup& warpgroup = my_warpgroup(at);
  Issuer& issuer = warpgroup.issuers[machine.thread->id % 128];
  const int done = static_cast<int>(issuer.groups.size()) - N;
  if (done <= 0) return;
  wait_for_work(warpgroup, issuer.groups[done - 1], "wgmma_wait", at);
  learn(warpgroup.slot + machine.thread->id % 128 / 32, done);
  for (auto it = issuer.held.begin(); it != issuer.held.end();) {
    auto& [registers, held] = *it;
    if (held.accumulator || held.last > issuer.groups[done - 1]) {
      ++it;
      continue;
    }
    check_untouched(registers, held, at);
    std::copy(held.values.begin(), held.values.end(), registers);
    it = issuer.held.erase(it);
  }
}

// After that, and the registers hold the sums.
template <int N, int M>
inline void wgmma_give_registers(float (&registers)[M], const Where& at) {
  using namespace host;
  Issuer& issuer = my_issuer(at);
  auto* begin = reinterpret_cast<uint32_t*>(registers);
  const int done = static_cast<int>(issuer.groups.size()) - N;
  const uint64_t products = done > 0 ? issuer.groups[done - 1] : 0;
  for (auto it = issuer.held.lower_bound(begin); it != issuer.held.end() && it->first < begin + M;) {
    auto& [of, held] = *it;
    if (held.last > products) {
      fail_with(at, format("wgmma_wait<%d> names registers that the product at %s still uses: it is in %s", N,
                           place(held.at).c_str(),
                           issuer.groups.empty() || held.last > issuer.groups.back() ? "no committed group" : "a later group"));
    }
    check_untouched(of, held, at);
    std::copy(held.values.begin(), held.values.end(), of);
    it = issuer.held.erase(it);
  }
}

template <class T, Major A_MAJOR, Major B_MAJOR, int M, class A, class B>
inline void wgmma_shared(float (&d)[M], const A& a, const B& b, bool accumulate, const Where& at) {
  host::Instruction what;
  what.n = 2 * M, what.bf16 = std::is_same_v<T, bf16>, what.accumulate = accumulate;
  what.a_shared = true, what.a_major = A_MAJOR, what.b_major = B_MAJOR;
  what.a = a.descriptor(), what.a_region = a.tile().region();
  what.b = b.descriptor(), what.b_region = b.tile().region();
  host::issue(d, nullptr, what, at);
}
template <class T, Major B_MAJOR, int M, class B>
inline void wgmma_registers(float (&d)[M], const uint32_t* a, const B& b, bool accumulate, const Where& at) {
  host::Instruction what;
  what.n = 2 * M, what.bf16 = std::is_same_v<T, bf16>, what.accumulate = accumulate, what.b_major = B_MAJOR;
  what.b = b.descriptor(), what.b_region = b.tile().region();
  host::issue(d, a, what, at);
}

}  // namespace device
