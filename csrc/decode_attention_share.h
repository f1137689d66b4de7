// What a block of decode_attention works on: its share of a row's keys, where these lie, which of them a row of queries sees.
#pragma once

#include "decode_attention.h"

#include "device/device.h"

namespace {

using namespace device;

using Args = fastlm_decode_attention;

constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kMostWidth = 256;
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kHidden = -2e38f;  // a bias below hides the key: the lowest fp32 number as well as -inf

DEVICE int64_t integer(const void* p, bool wide, int64_t i, Where at = Where::current()) {
  if (wide) return load_vector<1>(Global<const int64_t>(static_cast<const int64_t*>(p)) + i, at)[0];
  return load_vector<1>(Global<const int32_t>(static_cast<const int32_t*>(p)) + i, at)[0];
}

template <class T>
DEVICE float number_as(const void* p, int64_t i, Where at) {
  return to_float(load_vector<1>(Global<const T>(static_cast<const T*>(p)) + i, at)[0]);
}
DEVICE float number(const void* p, int32_t dtype, int64_t i, Where at = Where::current()) {
  if (dtype == FASTLM_BFLOAT16) return number_as<bf16>(p, i, at);
  return dtype == FASTLM_FLOAT16 ? number_as<fp16>(p, i, at) : number_as<float>(p, i, at);
}

DEVICE int clamped(int64_t x, int64_t most) { return static_cast<int>(maximum<int64_t>(0, minimum(x, most))); }

// What a block works on.
struct Share {
  int b, h_kv, group;       // group: query heads of a key head
  int row, rows;            // first row of its tile and how many there are; row r is query r / group of head r % group
  int position;             // of the first query among the keys; may be negative
  int start;                // keys before it are padding
  int lo, hi;               // keys that any of its rows sees
  int begin, end;           // those of this share and up to a tile before; begin is a multiple of the tile
  int live;                 // shares that have keys, at least 1

  DEVICE Share(const Args& a, int tile_rows, int tile_keys) {
    group = a.H / a.H_kv;
    const int all = a.S * group, tiles = ceil_div(all, tile_rows);
    row = block_x() % tiles * tile_rows;
    rows = minimum(tile_rows, all - row);
    h_kv = block_x() / tiles % a.H_kv;
    b = block_x() / tiles / a.H_kv;
    const int places = a.page_size * a.max_pages;
    position = clamped(integer(a.lengths, a.wide_lengths, b), places) - a.S;
    start = a.key_starts ? clamped(integer(a.key_starts, a.wide_starts, b), places) : 0;
    hi = maximum(0, position + (row + rows - 1) / group + 1);
    lo = minimum(hi, maximum(start, a.left < 0 ? 0 : position + row / group - a.left));
    const int first = lo / tile_keys * tile_keys, step = kWarps * tile_keys;
    const int steps = ceil_div(hi - first, step);
    const int each = maximum(ceil_div(steps, a.splits), ceil_div(a.least, step));
    live = maximum(1, ceil_div(steps, each));
    begin = block_y() < live ? first + block_y() * each * step : hi;
    end = block_y() + 1 < live ? begin + each * step : hi;
  }

  DEVICE bool is_live() const { return block_y() < live; }
  DEVICE int query(int r) const { return (row + r) / group; }
  DEVICE int head(int r) const { return h_kv * group + (row + r) % group; }
  // Of o [B, S, H]: where the row lies.
  DEVICE int64_t output(const Args& a, int r) const { return (static_cast<int64_t>(b) * a.S + query(r)) * a.H + head(r); }
};

// A row of the tile: where its query stands, the first key it sees.
struct Row {
  int position, first;
};

// Rows past the last see nothing.
DEVICE Row row_of(const Args& a, const Share& share, int r) {
  const bool live = r < share.rows;
  const int position = live ? share.position + share.query(r) : -1;
  return {position, maximum(share.start, a.left < 0 ? 0 : position - a.left)};
}

// Not EXACT: by exp2. Near 0 the difference of two numbers near 1 has few digits left: enough for 16-bit inputs, not for fp32.
template <bool EXACT>
DEVICE float tanh_of(float x) {
  return EXACT ? tanhf(x) : 1.0f - 2.0f * fast_reciprocal(fast_exp2(x * (2 * kLog2e)) + 1.0f);
}

// The base-2 logit of a product of row r's query and a key; -inf where the row does not see the key.
template <bool EXACT>
DEVICE float logit(const Args& a, const Share& share, const Row& row, int r, int key, float product,
                   Where at = Where::current()) {
  const bool seen = key >= row.first && key <= row.position;
  float s = product * (a.scale * kLog2e);
  if (a.softcap > 0) s = a.softcap * kLog2e * tanh_of<EXACT>(product * (a.scale / a.softcap));
  if (a.alibi_slopes && seen) {
    s -= number_as<float>(a.alibi_slopes, share.head(r), at) * kLog2e * static_cast<float>(row.position - key);
  }
  if (a.distances && seen) {
    const int distance = maximum(key - row.position, -a.reach) + a.reach;
    const int64_t first = share.head(r) * (2 * static_cast<int64_t>(a.reach) + 1);
    const float added = number(a.distances, a.distances_dtype, first + distance, at);
    s = added < kHidden ? -INFINITY : s + added * kLog2e;
  }
  return seen ? s : -INFINITY;
}

// Where the keys of a tile lie. Every lane looks up one key; where a tile never leaves its page, all the first.
struct Pages {
  bool whole;  // a tile never leaves its page

  DEVICE Pages(const Args& a, int tile_keys) : whole(!a.page_table || a.page_size % tile_keys == 0) {}

  struct Place {
    int page, slot;
  };

  DEVICE Place look_up(const Args& a, const Share& share, int tile, int tile_keys, Where at = Where::current()) const {
    if (!a.page_table) return {share.b, tile};
    const unsigned key = tile + (whole ? 0 : lane_id() % tile_keys), number = key / static_cast<unsigned>(a.page_size);
    const int slot = static_cast<int>(key - number * a.page_size), last = static_cast<int>(key) + (whole ? tile_keys : 1);
    if (last <= share.lo || static_cast<int>(key) >= share.end) return {0, slot};  // an entry that may be anything
    return {clamped(integer(a.page_table, a.wide_table, share.b * a.table_stride + number, at), a.pages - 1), slot};
  }

  // The offset of key i of the tile. All lanes call it.
  DEVICE int64_t offset(const Place& place, int i, const int64_t (&strides)[4], Where at = Where::current()) const {
    int page = place.page, slot = place.slot;
    if (whole) {
      slot += i;
    } else {
      page = shuffle(page, i, kAllLanes, 32, at);
      slot = shuffle(slot, i, kAllLanes, 32, at);
    }
    return page * strides[0] + slot * strides[1];
  }
};

}  // namespace
