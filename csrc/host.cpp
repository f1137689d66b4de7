// fastlm._host: the index building of the data loader, compiled. numpy arrays in, numpy arrays out.
//
// fastlm/data/packing.py holds the contract of both functions and a numpy twin that gives identical results; the tests
// compare the two. Only integer arithmetic is used, so results do not depend on the platform.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

namespace py = pybind11;

namespace {

using Indices = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;

// SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014).
constexpr uint64_t kGamma = 0x9E3779B97F4A7C15ull;

inline uint64_t mix(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

struct Keyed {
  uint64_t key;
  int64_t index;
};

// Sorts by key. The keys are uniform, so one pass into buckets by their top bits leaves a few elements for each sort:
// linear time, where one sort of everything would miss the cache on every level.
void sort_uniform(std::vector<Keyed>& items) {
  int bits = 0;
  while (bits < 20 && (items.size() >> bits) > 32) ++bits;
  auto by_key = [](const Keyed& a, const Keyed& b) { return a.key < b.key; };
  if (bits == 0) {
    std::sort(items.begin(), items.end(), by_key);
    return;
  }
  const int shift = 64 - bits;
  std::vector<size_t> ends((size_t{1} << bits) + 1, 0);
  for (const Keyed& item : items) ++ends[(item.key >> shift) + 1];
  std::partial_sum(ends.begin(), ends.end(), ends.begin());
  std::vector<Keyed> sorted(items.size());
  for (const Keyed& item : items) sorted[ends[item.key >> shift]++] = item;
  size_t begin = 0;  // each count has moved on to the end of its bucket
  for (size_t bucket = 0; bucket + 1 < ends.size(); ++bucket) {
    std::sort(sorted.begin() + begin, sorted.begin() + ends[bucket], by_key);
    begin = ends[bucket];
  }
  items.swap(sorted);
}

Indices permutation(int64_t n, uint64_t seed) {
  if (n < 0) throw std::invalid_argument("permutation: n must be >= 0, got " + std::to_string(n));
  Indices result(n);
  int64_t* out = result.mutable_data();
  {
    py::gil_scoped_release release;
    const uint64_t start = mix(seed);
    std::vector<Keyed> items(static_cast<size_t>(n));
    for (int64_t i = 0; i < n; ++i) items[i] = {mix(start + kGamma * (static_cast<uint64_t>(i) + 1)), i};
    sort_uniform(items);
    for (int64_t i = 0; i < n; ++i) out[i] = items[i].index;
  }
  return result;
}

py::tuple best_fit(const Indices& lengths_array, int64_t capacity) {
  if (lengths_array.ndim() != 1) throw std::invalid_argument("best_fit: lengths must have one dimension");
  if (capacity < 1) throw std::invalid_argument("best_fit: capacity must be >= 1, got " + std::to_string(capacity));
  const int64_t n = lengths_array.size();
  const int64_t* lengths = lengths_array.data();
  for (int64_t i = 0; i < n; ++i) {
    if (lengths[i] < 1 || lengths[i] > capacity) {
      throw std::invalid_argument("best_fit: lengths must lie in 1.." + std::to_string(capacity) + ", got " +
                                  std::to_string(lengths[i]));
    }
  }
  Indices rows_array(n), offsets_array(n);
  int64_t* rows = rows_array.mutable_data();
  int64_t* offsets = offsets_array.mutable_data();
  {
    py::gil_scoped_release release;
    std::vector<int64_t> order(static_cast<size_t>(n));
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return lengths[a] > lengths[b]; });
    std::vector<std::vector<int64_t>> open(static_cast<size_t>(capacity));  // rows by the space left in them
    std::set<int64_t> spaces;                                               // the spaces that some row has
    int64_t row_count = 0;
    for (int64_t item : order) {
      const int64_t length = lengths[item];
      const auto found = spaces.lower_bound(length);
      int64_t space = capacity;
      if (found == spaces.end()) {
        rows[item] = row_count++;
      } else {
        space = *found;
        rows[item] = open[space].back();
        open[space].pop_back();
        if (open[space].empty()) spaces.erase(found);
      }
      offsets[item] = capacity - space;
      if (space > length) {
        if (open[space - length].empty()) spaces.insert(space - length);
        open[space - length].push_back(rows[item]);
      }
    }
  }
  return py::make_tuple(rows_array, offsets_array);
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Compiled index building for fastlm.data; the contract and the numpy twin are in fastlm/data/packing.py.";
  m.def("permutation", &permutation, py::arg("n"), py::arg("seed"));
  m.def("best_fit", &best_fit, py::arg("lengths"), py::arg("capacity"));
}
