// decode_attention on mma.sync: 16-bit keys and values that 16-byte reads fit.
//
// Keys (K Q^T) and widths (V^T P^T) are the 16 rows of a product and 8 query rows its columns: eight heads of a group cost what
// one costs. The sum over a width may go in any order, so a lane's 16 bytes of a key are two of its fragments as they lie; a
// value's become fragments by interleaving two keys. While a tile is worked on, the next one's keys, then values, are on their
// way to the registers that it leaves.
#pragma once

#include "decode_attention_merge.h"
#include "device/mma.h"

namespace {

constexpr int kTile = 16;  // keys

using Word = Vector<uint32_t, 4>;  // eight elements

template <class T>
DEVICE Word read_word(Global<const T> p, bool wanted, Where at = Where::current()) {
  return wanted ? load_vector<4, Cache::read_only>(pointer_cast<const uint32_t>(p), at) : Word{};
}

// The selectors with which byte_permute takes the low halves of two registers, and the high ones.
constexpr uint32_t kLowHalves = 0x5410, kHighHalves = 0x7632;

// The tile's queries, into shared memory in the order in which lanes read them: eight widths 32c + 8t of row 8n + g at word
// (c * GROUPS + n) * 32 + 4g + t. A barrier has to follow.
template <class T, int WIDTH, int GROUPS>
DEVICE Shared<uint32_t> queries(const Args& a, const Share& share) {
  const Shared<uint32_t> q = dynamic_shared<uint32_t>(Found::bytes(a, 8 * GROUPS));
  for (int word = thread_id(); word < GROUPS * WIDTH; word += kThreads) {
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
  return q;
}

// What the warp has found, for the others: o and sums are those of decode_attention_kernel.
template <int WIDTH, int GROUPS>
DEVICE void put_found(const Args& a, const Found& found, const float (&o)[GROUPS][WIDTH / 16][4], Running (&sums)[GROUPS][2]) {
  const int g = lane_id() / 4, t = lane_id() % 4;
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
}

// Blocks of a kernel that an SM holds: as many as leave a thread the registers it needs.
constexpr int blocks_per_sm(int width, int groups) { return width == 64 ? 4 : width == 128 && groups == 1 ? 3 : 2; }

// WIDTH: at least key_width and value_width, multiples of 8. GROUPS: of eight rows.
template <class T, int WIDTH, int GROUPS>
KERNEL(kThreads, blocks_per_sm(WIDTH, GROUPS))
decode_attention_kernel(const Args a) {
  constexpr int KEY_CHUNKS = WIDTH / 32, VALUE_CHUNKS = WIDTH / 64;
  constexpr int HELD = minimum(VALUE_CHUNKS, 2);  // chunks of values: more would not fit in registers
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
  const Shared<uint32_t> q = queries<T, WIDTH, GROUPS>(a, share);
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

  put_found<WIDTH, GROUPS>(a, found, o, sums);
  combine<4>(a, share, found);
}

}  // namespace
