// Attention of a few new tokens over a cache (fastlm/ops/decode_attention.py has the contract), split over the keys
// (flash-decoding: Dao et al. 2023). Reading keys and values is all that takes time: each is read once, straight into registers.
//
// A block owns one key head of one sequence, one share of its keys and a tile of rows: the query heads that read that key head,
// times the new tokens. Its warps take tiles of keys by turns and meet at the end. The shares of one tile of rows leave output,
// maximum and sum in fp32; the last of them to finish brings all together, in order: the same bits whichever it is.
//
// 16-bit keys go through mma.sync with keys (K Q^T) and widths (V^T P^T) as the 16 rows of a product and 8 query rows as its
// columns: eight heads of a group cost what one costs. The sum over a width may go in any order, so a lane's 16 bytes of a key
// are two of its fragments as they lie; a value's become fragments by interleaving two keys. While a tile is worked on, the next
// one's keys, then values, are on their way to the registers that it leaves.
//
// The rest (fp32, widths and addresses that 16-byte reads do not fit) takes a key to a lane, with plain products.

#include "decode_attention.h"

#include "device/device.h"
#include "device/mma.h"

namespace {

using namespace device;

using Args = fastlm_decode_attention;

constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kMostWidth = 256;
constexpr int kPlainRows = 8, kPlainTile = 32;
constexpr int kTile = 16;  // keys of a tile of the kernel on mma
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kHidden = -2e38f;  // a bias below hides the key: the lowest fp32 number as well as -inf
constexpr int kInvalidValue = 1;   // cudaErrorInvalidValue

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

template <class T, int VEC>
DEVICE void put_as(void* p, int64_t i, const Vector<float, VEC>& values, Where at) {
  Vector<T, VEC> out;
#pragma unroll
  for (int j = 0; j < VEC; ++j) out[j] = from_float<T>(values[j]);
  store_vector(Global<T>(static_cast<T*>(p)) + i, out, at);
}
template <int VEC>
DEVICE void put(void* p, int32_t dtype, int64_t i, const Vector<float, VEC>& values, Where at = Where::current()) {
  if (dtype == FASTLM_BFLOAT16) return put_as<bf16, VEC>(p, i, values, at);
  return dtype == FASTLM_FLOAT16 ? put_as<fp16, VEC>(p, i, values, at) : put_as<float, VEC>(p, i, values, at);
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

// The running maximum and sum of a row.
struct Running {
  float top = -INFINITY, total = 0;
};
DEVICE float base_of(float top) { return top == -INFINITY ? 0.0f : top; }  // of a row that has seen nothing: no inf - inf

// What to multiply the output with, and the log-sum-exp. 0 and -inf if the row saw nothing.
struct Finished {
  float factor, lse;

  DEVICE Finished(const Args& a, const Running& sum, int head, Where at = Where::current()) {
    float shrink = 1, total = sum.total, top = sum.top;
    if (a.sinks) {  // one more logit in the sum, with no value
      const float sink = number(a.sinks, a.sinks_dtype, head, at) * kLog2e, higher = base_of(maximum(top, sink));
      shrink = fast_exp2(top - higher);
      total = total * shrink + fast_exp2(sink - higher);
      top = higher;
    }
    const bool dead = sum.total == 0;
    factor = dead ? 0 : shrink / total;
    lse = dead ? -INFINITY : (top + fast_log2(total)) * kLn2;
  }
};

// What the warps of a block have found, in shared memory: output [kWarps][tile rows][pitch], maxima and sums [kWarps][tile rows].
struct Found {
  Shared<float> o, tops, totals;
  int tile_rows, pitch;

  DEVICE Found(const Args& a, int tile_rows_)
      : o(dynamic_shared<float>()), tops(o), totals(o), tile_rows(tile_rows_), pitch(ceil_div(a.value_width, 4) * 4) {
    tops = o + kWarps * tile_rows * pitch;
    totals = tops + kWarps * tile_rows;
  }
  EVERYWHERE static int bytes(const Args& a, int tile_rows) {
    return kWarps * tile_rows * (ceil_div(a.value_width, 4) * 4 + 2) * static_cast<int>(sizeof(float));
  }

  DEVICE Running stats(int warp, int r) const {
    Running sum;
    sum.top = tops[warp * tile_rows + r];
    sum.total = totals[warp * tile_rows + r];
    return sum;
  }
  DEVICE void put(int r, const Running& sum) const {
    tops[warp_id() * tile_rows + r] = sum.top;
    totals[warp_id() * tile_rows + r] = sum.total;
  }
};

template <int VEC>
using Floats = Vector<float, VEC>;

// Writes a row's output; its first thread also the log-sum-exp.
template <int VEC>
DEVICE void finish(const Args& a, const Share& share, int r, int column, const Running& sum, const Floats<VEC>& o,
                   Where at = Where::current()) {
  const Finished f(a, sum, share.head(r), at);
  Floats<VEC> out;
#pragma unroll
  for (int i = 0; i < VEC; ++i) out[i] = o[i] * f.factor;
  put<VEC>(a.o, a.dtype, share.output(a, r) * a.value_width + column, out, at);
  if (column > 0) return;
  const Global<float> lse(a.lse);
  lse[(static_cast<int64_t>(share.b) * a.H + share.head(r)) * a.S + share.query(r)] = f.lse;
}

// Brings the warps of the block together, then, in the last of them, its shares. VEC columns to a thread.
template <int VEC>
DEVICE void combine(const Args& a, const Share& share, const Found& found) {
  const int chunks = a.value_width / VEC, items = share.rows * chunks;
  const int64_t outputs = static_cast<int64_t>(a.B) * a.S * a.H;
  const Global<float> partial(a.partial), stats(a.stats);
  block_barrier();
  for (int item = thread_id(); item < items; item += kThreads) {
    const int r = item / chunks, column = item % chunks * VEC;
    Running sum;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum.top = maximum(sum.top, found.stats(w, r).top);
    Floats<VEC> o{};
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const Running one = found.stats(w, r);
      const float weight = fast_exp2(one.top - base_of(sum.top));
      const Floats<VEC> part = load_vector<VEC>(found.o + (w * found.tile_rows + r) * found.pitch + column);
      sum.total += one.total * weight;
#pragma unroll
      for (int i = 0; i < VEC; ++i) o[i] += part[i] * weight;
    }
    if (share.live == 1) {
      finish<VEC>(a, share, r, column, sum, o);
      continue;
    }
    const int64_t to = block_y() * outputs + share.output(a, r);
    store_vector(partial + to * a.value_width + column, o);
    if (column == 0) store_vector(stats + 2 * to, Floats<2>{{sum.top, sum.total}});
  }
  if (share.live == 1 || !is_last_block(Global<unsigned>(a.counters) + block_x(), share.live)) return;
  for (int item = thread_id(); item < items; item += kThreads) {
    const int r = item / chunks, column = item % chunks * VEC;
    const int64_t at = share.output(a, r);
    Running sum;
    for (int i = 0; i < share.live; ++i) sum.top = maximum(sum.top, load_vector<2>(stats + 2 * (i * outputs + at))[0]);
    Floats<VEC> o{};
#pragma unroll 16  // nothing else is going on any more: many reads on their way at once
    for (int i = 0; i < share.live; ++i) {
      const int64_t from = i * outputs + at;
      const Floats<2> one = load_vector<2>(stats + 2 * from);
      const float weight = fast_exp2(one[0] - base_of(sum.top));
      const Floats<VEC> part = load_vector<VEC>(partial + from * a.value_width + column);
      sum.total += one[1] * weight;
#pragma unroll
      for (int j = 0; j < VEC; ++j) o[j] += part[j] * weight;
    }
    finish<VEC>(a, share, r, column, sum, o);
  }
}

// --- on mma -----------------------------------------------------------------------------------------------------------

using Word = Vector<uint32_t, 4>;  // eight elements

template <class T>
DEVICE Word read_word(Global<const T> p, bool wanted, Where at = Where::current()) {
  return wanted ? load_vector<4, Cache::read_only>(pointer_cast<const uint32_t>(p), at) : Word{};
}

// The selectors with which byte_permute takes the low halves of two registers, and the high ones.
constexpr uint32_t kLowHalves = 0x5410, kHighHalves = 0x7632;

// Blocks of a kernel that an SM holds: as many as leave a thread the registers it needs.
constexpr int blocks_per_sm(int width, int groups) { return width == 64 ? 4 : width == 128 && groups == 1 ? 3 : 2; }

// WIDTH: at least key_width and value_width, multiples of 8. GROUPS: of eight rows.
template <class T, int WIDTH, int GROUPS>
KERNEL(kThreads, blocks_per_sm(WIDTH, GROUPS))
decode_attention_kernel(const Args a) {
  constexpr int KEY_CHUNKS = WIDTH / 32, VALUE_CHUNKS = WIDTH / 64;
  constexpr int HELD = minimum(VALUE_CHUNKS, 2), PARTS = VALUE_CHUNKS / HELD;  // more chunks of values would not fit in registers
  const Share share(a, 8 * GROUPS, kTile);
  if (!share.is_live()) return;
  const Pages pages(a, kTile);
  const int g = lane_id() / 4, t = lane_id() % 4;

  Row rows[GROUPS][2];
#pragma unroll
  for (int n = 0; n < GROUPS; ++n) {
    rows[n][0] = row_of(a, share, 8 * n + 2 * t);
    rows[n][1] = row_of(a, share, 8 * n + 2 * t + 1);
  }

  const Global<const T> k_base = Global<const T>(static_cast<const T*>(a.k)) + share.h_kv * a.k_strides[2] + 8 * t;
  const Global<const T> v_base = Global<const T>(static_cast<const T*>(a.v)) + share.h_kv * a.v_strides[2] + 8 * g;
  Word k[2][KEY_CHUNKS], v[4][HELD];  // keys g and g + 8; 2t, 2t + 1, 2t + 8, 2t + 9
  const auto wanted = [&](int key) { return key >= share.lo && key < share.end; };
  const auto load_keys = [&](const Pages::Place& place, int tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = g + 8 * half;
      const Global<const T> from = k_base + pages.offset(place, i, a.k_strides);
#pragma unroll
      for (int c = 0; c < KEY_CHUNKS; ++c) {
        k[half][c] = read_word<T>(from + 32 * c, wanted(tile + i) && 32 * c + 8 * t < a.key_width);
      }
    }
  };
  const auto load_values = [&](const Pages::Place& place, int tile, int part) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int i = 2 * t + j % 2 + j / 2 * 8;
      const Global<const T> from = v_base + pages.offset(place, i, a.v_strides);
#pragma unroll
      for (int c = 0; c < HELD; ++c) {
        const int column = 64 * (part * HELD + c);
        v[j][c] = read_word<T>(from + column, wanted(tile + i) && column + 8 * g < a.value_width);
      }
    }
  };

  constexpr int STEP = kWarps * kTile;
  float o[GROUPS][WIDTH / 16][4] = {};  // widths g * 8 + 2i and + 1 of 64 * (m / 4), i = m % 4; rows 2t and 2t + 1
  Running sums[GROUPS][2];              // of what this lane has seen but for the maximum, which is the warp's
  int tile = share.begin + warp_id() * kTile;
  Pages::Place place = pages.look_up(a, share, tile, kTile);
  Pages::Place next = pages.look_up(a, share, tile + STEP, kTile);
  load_keys(place, tile);
  load_values(place, tile, 0);
  const Found found(a, 8 * GROUPS);
  // In the order in which lanes read it: eight widths 32c + 8t of row 8n + g at word (c * GROUPS + n) * 32 + 4g + t.
  const Shared<uint32_t> q = dynamic_shared<uint32_t>(Found::bytes(a, 8 * GROUPS));
  for (int word = thread_id(); word < 32 * GROUPS * KEY_CHUNKS; word += kThreads) {
    const int r = word / 4 % (8 * GROUPS), column = word / (32 * GROUPS) * 32 + word % 4 * 8;
    const int live = minimum(r, share.rows - 1);  // rows past the last repeat it, and see nothing
    const Global<const T> row = Global<const T>(static_cast<const T*>(a.q)) + share.b * a.q_strides[0] +
                                share.query(live) * a.q_strides[1] + share.head(live) * a.q_strides[2];
    Vector<T, 8> x;
#pragma unroll
    for (int i = 0; i < 8; ++i) {  // one by one: it may lie at any address, and is read once
      x[i] = from_float<T>(0.0f);
      if (column < a.key_width) x[i] = load_vector<1>(row + column + i)[0];
    }
    store_vector(pointer_cast<T>(q) + 8 * word, x);
  }
  block_barrier();
  for (; tile < share.end; tile += STEP) {
    float s[GROUPS][4] = {};  // keys g and g + 8, rows 2t and 2t + 1
#pragma unroll
    for (int c = 0; c < KEY_CHUNKS; ++c) {
#pragma unroll
      for (int n = 0; n < GROUPS; ++n) {
        const Word x = load_vector<4>(q + ((c * GROUPS + n) * 32 + lane_id()) * 4);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          mma<T>(s[n], {k[0][c][2 * half], k[1][c][2 * half], k[0][c][2 * half + 1], k[1][c][2 * half + 1]},
                 {x[2 * half], x[2 * half + 1]});
        }
      }
    }
    const Pages::Place here = place;
    place = next;
    load_keys(place, tile + STEP);
    next = pages.look_up(a, share, tile + 2 * STEP, kTile);

    uint32_t p[GROUPS][2];  // keys 2t and 2t + 1, then 2t + 8 and 2t + 9, of row g
#pragma unroll
    for (int n = 0; n < GROUPS; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        Running& sum = sums[n][j];
        const int r = 8 * n + 2 * t + j;
        s[n][j] = logit<false>(a, share, rows[n][j], r, tile + g, s[n][j]);
        s[n][2 + j] = logit<false>(a, share, rows[n][j], r, tile + g + 8, s[n][2 + j]);
        float top = maximum(sum.top, maximum(s[n][j], s[n][2 + j]));
#pragma unroll
        for (int bits = 4; bits < 32; bits *= 2) top = maximum(top, shuffle_xor(top, bits));
        const float base = base_of(top), shrink = fast_exp2(sum.top - base);
        s[n][j] = fast_exp2(s[n][j] - base);
        s[n][2 + j] = fast_exp2(s[n][2 + j] - base);
        sum.total = sum.total * shrink + (s[n][j] + s[n][2 + j]);
        sum.top = top;
#pragma unroll
        for (int m = 0; m < WIDTH / 16; ++m) {
          o[n][m][j] *= shrink;
          o[n][m][2 + j] *= shrink;
        }
      }
      // Lane (g, t) has keys g of rows 2t and 2t + 1 and needs keys 2t and 2t + 1 of row g.
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t mine = pack(from_float<T>(s[n][2 * half]), from_float<T>(s[n][2 * half + 1]));
        const uint32_t low = shuffle(mine, 8 * t + g / 2), high = shuffle(mine, 8 * t + 4 + g / 2);
        p[n][half] = byte_permute(low, high, g % 2 ? kHighHalves : kLowHalves);
      }
    }
#pragma unroll
    for (int m = 0; m < WIDTH / 16; ++m) {
      const int part = m / (4 * HELD), c = m / 4 % HELD, i = m % 4;
      if (part > 0 && m % (4 * HELD) == 0) load_values(here, tile, part);
      const uint32_t a0 = v[0][c][i], a1 = v[1][c][i], a2 = v[2][c][i], a3 = v[3][c][i];
      const uint32_t fragment[4] = {byte_permute(a0, a1, kLowHalves), byte_permute(a0, a1, kHighHalves),
                                    byte_permute(a2, a3, kLowHalves), byte_permute(a2, a3, kHighHalves)};
#pragma unroll
      for (int n = 0; n < GROUPS; ++n) mma<T>(o[n][m], fragment, p[n]);
    }
    load_values(place, tile + STEP, 0);
  }

#pragma unroll
  for (int n = 0; n < GROUPS; ++n) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int r = 8 * n + 2 * t + j;
#pragma unroll
      for (int bits = 4; bits < 32; bits *= 2) sums[n][j].total += shuffle_xor(sums[n][j].total, bits);
      if (g == 0) found.put(r, sums[n][j]);
      const Shared<float> to = found.o + (warp_id() * found.tile_rows + r) * found.pitch + 8 * g;
#pragma unroll
      for (int m = 0; m < WIDTH / 16; m += 2) {
        const int column = 64 * (m / 4) + m % 4 * 2;
        if (8 * g + 64 * (m / 4) >= a.value_width) continue;
        store_vector(to + column, Floats<4>{{o[n][m][j], o[n][m][2 + j], o[n][m + 1][j], o[n][m + 1][2 + j]}});
      }
    }
  }
  combine<4>(a, share, found);
}

// --- a key to a lane --------------------------------------------------------------------------------------------------

// Elements i to i + VEC - 1 of a cache: 4 are of fp32.
template <int VEC>
DEVICE Floats<VEC> read_floats(const Args& a, const void* p, int64_t i, Where at = Where::current()) {
  if constexpr (VEC == 1) {
    return {{number(p, a.dtype, i, at)}};
  } else {
    return load_vector<VEC, Cache::read_only>(Global<const float>(static_cast<const float*>(p)) + i, at);
  }
}

// VEC: elements to a read; 1 where the dtype is not fp32, or strides, addresses or widths do not allow more.
template <int VEC>
KERNEL(kThreads)
decode_attention_plain_kernel(const Args a) {
  constexpr int CHUNKS = kMostWidth / (32 * VEC);
  const Share share(a, kPlainRows, kPlainTile);
  if (!share.is_live()) return;
  const Pages pages(a, kPlainTile);
  const Found found(a, kPlainRows);
  const Shared<float> q = dynamic_shared<float>(Found::bytes(a, kPlainRows));  // [kPlainRows][key_width]
  for (int i = thread_id(); i < kPlainRows * a.key_width; i += kThreads) {
    const int r = minimum(i / a.key_width, share.rows - 1);
    const int64_t row = share.b * a.q_strides[0] + share.query(r) * a.q_strides[1] + share.head(r) * a.q_strides[2];
    q[i] = number(a.q, a.dtype, row + i % a.key_width);
  }
  block_barrier();

  float o[kPlainRows][CHUNKS][VEC] = {};
  Running sums[kPlainRows];
  for (int tile = share.begin + warp_id() * kPlainTile; tile < share.end; tile += kWarps * kPlainTile) {
    const Pages::Place place = pages.look_up(a, share, tile, kPlainTile);
    const int key = tile + lane_id();
    const int64_t from = share.h_kv * a.k_strides[2] + pages.offset(place, lane_id(), a.k_strides);
    float p[kPlainRows] = {};
    if (key >= share.lo && key < share.end) {
#pragma unroll 4
      for (int d = 0; d < a.key_width; d += VEC) {
        const Floats<VEC> x = read_floats<VEC>(a, a.k, from + d * a.k_strides[3]);
#pragma unroll
        for (int r = 0; r < kPlainRows; ++r) {
          const Floats<VEC> y = load_vector<VEC>(q + (r * a.key_width + d));
#pragma unroll
          for (int i = 0; i < VEC; ++i) p[r] += x[i] * y[i];
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kPlainRows; ++r) {
      p[r] = logit<true>(a, share, row_of(a, share, r), r, key, p[r]);
      const float top = warp_max(maximum(sums[r].top, p[r])), base = base_of(top), shrink = fast_exp2(sums[r].top - base);
      p[r] = fast_exp2(p[r] - base);
      sums[r].total = sums[r].total * shrink + p[r];
      sums[r].top = top;
#pragma unroll
      for (int c = 0; c < CHUNKS; ++c) {
#pragma unroll
        for (int i = 0; i < VEC; ++i) o[r][c][i] *= shrink;
      }
    }
    const int first = maximum(0, share.lo - tile), last = minimum(kPlainTile, share.end - tile);
#pragma unroll 2
    for (int j = first; j < last; ++j) {
      const int64_t row = share.h_kv * a.v_strides[2] + pages.offset(place, j, a.v_strides);
      float weights[kPlainRows];
#pragma unroll
      for (int r = 0; r < kPlainRows; ++r) weights[r] = shuffle(p[r], j);
#pragma unroll
      for (int c = 0; c < CHUNKS; ++c) {
        const int column = (32 * c + lane_id()) * VEC;
        if (column >= a.value_width) continue;
        const Floats<VEC> x = read_floats<VEC>(a, a.v, row + column * a.v_strides[3]);
#pragma unroll
        for (int r = 0; r < kPlainRows; ++r) {
#pragma unroll
          for (int i = 0; i < VEC; ++i) o[r][c][i] += weights[r] * x[i];
        }
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kPlainRows; ++r) {
    sums[r].total = warp_sum(sums[r].total);
    if (lane_id() == 0) found.put(r, sums[r]);
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
      const int column = (32 * c + lane_id()) * VEC;
      if (column >= a.value_width) continue;
      Floats<VEC> part;
#pragma unroll
      for (int i = 0; i < VEC; ++i) part[i] = o[r][c][i];
      store_vector(found.o + (warp_id() * kPlainRows + r) * found.pitch + column, part);
    }
  }
  combine<VEC>(a, share, found);
}

// --- which kernel -----------------------------------------------------------------------------------------------------

// Whether keys and values can be read `elements` at a time, 16 bytes, everywhere.
bool in_vectors(const Args& a, int elements) {
  const auto fits = [&](const void* p, const int64_t* strides, int width) {
    return reinterpret_cast<uintptr_t>(p) % 16 == 0 && strides[0] % elements == 0 && strides[1] % elements == 0 &&
           strides[2] % elements == 0 && strides[3] == 1 && width % elements == 0;
  };
  return fits(a.k, a.k_strides, a.key_width) && fits(a.v, a.v_strides, a.value_width);
}

struct Plan {
  bool on_mma;
  int width, groups;  // on mma

  explicit Plan(const Args& a) {
    const int most = maximum(a.key_width, a.value_width);
    on_mma = a.dtype != FASTLM_FLOAT32 && in_vectors(a, 8);
    groups = a.S * (a.H / a.H_kv) > 8 && most <= 128 ? 2 : 1;
    width = most <= 64 && groups == 1 ? 64 : most <= 128 ? 128 : 256;
  }
  int rows() const { return on_mma ? 8 * groups : kPlainRows; }
  int64_t blocks(const Args& a) const {
    return static_cast<int64_t>(a.B) * a.H_kv * ceil_div(a.S * (a.H / a.H_kv), rows());
  }
};

template <class T, int WIDTH, int GROUPS>
int start_kernel(const Args& a, Dim grid, void* stream) {
  const int bytes = Found::bytes(a, 8 * GROUPS) + 8 * GROUPS * WIDTH * static_cast<int>(sizeof(T));
  return launch(decode_attention_kernel<T, WIDTH, GROUPS>, grid, kThreads, bytes, stream, a);
}

template <class T>
int start_on_mma(const Args& a, const Plan& plan, Dim grid, void* stream) {
  if (plan.groups == 2) return start_kernel<T, 128, 2>(a, grid, stream);
  switch (plan.width) {
    case 64: return start_kernel<T, 64, 1>(a, grid, stream);
    case 128: return start_kernel<T, 128, 1>(a, grid, stream);
    case 256: return start_kernel<T, 256, 1>(a, grid, stream);
    default: return kInvalidValue;
  }
}

int start_plain(const Args& a, Dim grid, void* stream) {
  const int bytes = Found::bytes(a, kPlainRows) + kPlainRows * a.key_width * static_cast<int>(sizeof(float));
  const bool vectors = a.dtype == FASTLM_FLOAT32 && in_vectors(a, 4);
  return launch(vectors ? decode_attention_plain_kernel<4> : decode_attention_plain_kernel<1>, grid, kThreads, bytes, stream, a);
}

bool is_valid(const Args& a) {
  return a.B > 0 && a.S > 0 && a.H_kv > 0 && a.H > 0 && a.H % a.H_kv == 0 && a.key_width > 0 && a.key_width <= kMostWidth &&
         a.value_width > 0 && a.value_width <= kMostWidth && a.page_size > 0 && a.max_pages > 0 && a.pages > 0 &&
         static_cast<int64_t>(a.page_size) * a.max_pages <= FASTLM_DECODE_ATTENTION_PLACES && a.splits > 0 &&
         a.splits <= 65535 && a.least > 0 && a.dtype >= FASTLM_FLOAT32 && a.dtype <= FASTLM_FLOAT16 &&
         Plan(a).blocks(a) <= 0x7fffffff;
}

}  // namespace

extern "C" int fastlm_decode_attention_fwd(const fastlm_decode_attention* args, void* stream) {
  const Args& a = *args;
  if (!is_valid(a)) return kInvalidValue;
  const Plan plan(a);
  const Dim grid{static_cast<int>(plan.blocks(a)), a.splits};
  if (a.splits > 1) {
    const int error = fill_zero(a.counters, sizeof(*a.counters) * grid.x, stream);
    if (error) return error;
  }
  if (!plan.on_mma) return start_plain(a, grid, stream);
  switch (a.dtype) {
    case FASTLM_BFLOAT16: return start_on_mma<bf16>(a, plan, grid, stream);
    case FASTLM_FLOAT16: return start_on_mma<fp16>(a, plan, grid, stream);
    default: return kInvalidValue;
  }
}

extern "C" int fastlm_decode_attention_blocks(const fastlm_decode_attention* args, int32_t* per_sm) {
  const Plan plan(*args);
  if (per_sm) *per_sm = plan.on_mma ? blocks_per_sm(plan.width, plan.groups) : 3;
  return static_cast<int>(plan.blocks(*args));
}

extern "C" int fastlm_decode_attention_splits(int64_t blocks, int64_t most, int64_t slots) {
  struct Asked {
    int64_t blocks, most, slots;
    bool operator==(const Asked&) const = default;
  };
  static thread_local Asked last{};  // every layer asks the same: the search takes microseconds
  static thread_local int answer = 1;
  const Asked asked{blocks, most, slots};
  if (asked == last) return answer;
  const auto filled = [&](int64_t n) {
    return static_cast<double>(blocks * n) / static_cast<double>(ceil_div(blocks * n, slots) * slots);
  };
  double best = 0;
  for (int64_t n = 1; n <= most; ++n) best = maximum(best, filled(n));
  answer = 1;
  while (answer < most && filled(answer) < 0.9 * best) ++answer;
  last = asked;
  return answer;
}
