// Attention forward on Hopper (fastlm/ops/attention.py has the contract): bf16 and fp16, heads 64, 128 or 256 wide, grouped
// queries, a diagonal; after FlashAttention-3 (Shah et al. 2024, arXiv:2407.08608).
//
// A thread block takes tiles of queries, as many in turn as there are more tiles than blocks. One warpgroup, of which one thread
// works, loads keys and values into two rings of two stages; each of the others has 64 queries. Per tile of keys a warpgroup
// issues the next scores, s = q k^T, and then the last output, o += p v, and computes the softmax of the former while the tensor
// cores work on the latter; warpgroups take turns to issue (named barriers), so that one's softmax falls into another's products.
// Probabilities stay in registers: the accumulator of s, rounded, is the fragment that o += p v takes.
//
// Sums of a row are fp32; scores are multiplied by scale * log2(e) within the fused multiply-add before exp2.

#include "attention.h"

#include "device/wgmma.h"

namespace {

using namespace device;

constexpr int kInvalidValue = 1, kNotSupported = 801;  // cudaErrorInvalidValue, cudaErrorNotSupported
constexpr int kStages = 2;
enum NamedBarriers { kTurn = 1, kStore = 5 };  // the first of one for each warpgroup
constexpr int64_t kCached = int64_t{24} << 20;  // bytes of keys and values that are worked on at a time: they stay in L2

struct Problem {
  float* lse;
  int batch, queries, keys, heads, group;  // group: heads that share keys
  int diagonal;
  int query_tiles, tiles, section;  // section: (batch, head) pairs whose tiles follow each other
  float scale, scale_log2;
};

// Where a tile lies, and how many tiles of keys it sees.
struct Tile {
  int query, head, batch, key_tiles;
};

// Within a section the last queries come first: under a diagonal they have most to do.
template <int ROWS, int KEYS>
DEVICE Tile tile_of(const Problem& p, int index) {
  const int in_section = p.section * p.query_tiles, section = index / in_section, rest = index % in_section;
  const int first = section * p.section, pairs = minimum(p.section, p.batch * p.heads - first);
  const int pair = first + rest % pairs, query = (p.query_tiles - 1 - rest / pairs) * ROWS;
  const int last = minimum(query + ROWS, p.queries) - 1;
  const int seen = minimum(p.keys, last + p.diagonal + 1);
  return {query, pair % p.heads, pair / p.heads, seen > 0 ? ceil_div(seen, KEYS) : 0};
}

template <class T, int WIDTH, int KEYS, int GROUPS>
struct Attention {
  static constexpr int kRows = 64 * GROUPS, kThreads = 128 * (GROUPS + 1);
  static constexpr int kQueries = 64 * WIDTH, kTile = KEYS * WIDTH;  // elements of a warpgroup's queries, of a tile of keys
  static constexpr int kSharedBytes = 2 * (GROUPS * kQueries + 2 * kStages * kTile);
};

// Barriers of a block. full: the copy has come; empty: every warp is done with keys and values, every warpgroup with its queries.
struct Barriers {
  Shared<Mbarrier> q_full, q_empty, k_full, k_empty, v_full, v_empty;
};

template <class A, int KEYS, class T>
DEVICE void produce(const TensorMap& q_map, const TensorMap& k_map, const TensorMap& v_map, const Problem& p, const Barriers& b,
                    Shared<T> q, Shared<T> k, Shared<T> v) {
  constexpr int PANELS = A::kQueries / (64 * 64);
  const auto load = [&](const TensorMap& map, Shared<T> ring, Shared<Mbarrier> full, Shared<Mbarrier> empty, int n, int key,
                        const Tile& tile) {
    const int stage = n % kStages;
    mbarrier_wait(empty + stage, n / kStages % 2 ^ 1);
    mbarrier_arrive_expect(full + stage, A::kTile * 2);
    for (int c = 0; c < PANELS; ++c) {
      tensor_load(ring + (stage * A::kTile + c * KEYS * 64), map, full + stage, {64 * c, tile.head / p.group, key, tile.batch});
    }
  };
  int n = 0;  // tiles of keys so far
  for (int index = block_x(), turn = 0; index < p.tiles; index += grid_x(), ++turn) {
    const Tile tile = tile_of<A::kRows, KEYS>(p, index);
    mbarrier_wait(b.q_empty, turn % 2 ^ 1);
    mbarrier_arrive_expect(b.q_full, A::kRows / 64 * A::kQueries * 2);
    for (int c = 0; c < A::kRows / 64 * PANELS; ++c) {
      tensor_load(q + c * 64 * 64, q_map, b.q_full, {c % PANELS * 64, tile.head, tile.query + c / PANELS * 64, tile.batch});
    }
    // From the last keys to the first. Values come a tile later than keys: they are needed later.
    for (int i = tile.key_tiles - 1; i >= 0; --i, ++n) {
      load(k_map, k, b.k_full, b.k_empty, n, i * KEYS, tile);
      if (i < tile.key_tiles - 1) load(v_map, v, b.v_full, b.v_empty, n - 1, (i + 1) * KEYS, tile);
    }
    if (tile.key_tiles > 0) load(v_map, v, b.v_full, b.v_empty, n - 1, 0, tile);
  }
}

// -inf where a key is not seen: `seen` counts the columns of the tile that row e of this thread sees, from its own first column.
template <int M>
DEVICE void hide(float (&s)[M], const int (&seen)[2]) {
#pragma unroll
  for (int i = 0; i < M; ++i) {
    if (8 * (i / 4) + i % 2 >= seen[i / 2 % 2]) s[i] = -INFINITY;
  }
}

// Scores become probabilities, up to a factor that is the row's: top and total are its maximum and sum so far. Returns by what
// earlier sums must be multiplied.
template <int M>
DEVICE void softmax_step(float (&s)[M], float (&top)[2], float (&total)[2], float (&factor)[2], float scale_log2) {
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    float highest = top[e];
#pragma unroll
    for (int i = 2 * e; i < M; i += 4) highest = fmaxf(highest, fmaxf(s[i], s[i + 1]));
    highest = fmaxf(highest, shuffle_xor(highest, 1));  // four lanes share a row
    highest = fmaxf(highest, shuffle_xor(highest, 2));
    const float shift = highest == -INFINITY ? 0.0f : highest * scale_log2;  // -inf - -inf would be NaN
    factor[e] = fast_exp2(fmaf(top[e], scale_log2, -shift));
    top[e] = highest;
    total[e] *= factor[e];
#pragma unroll
    for (int i = 2 * e; i < M; i += 4) {
      s[i] = fast_exp2(fmaf(s[i], scale_log2, -shift));
      s[i + 1] = fast_exp2(fmaf(s[i + 1], scale_log2, -shift));
      total[e] += s[i] + s[i + 1];
    }
  }
}

template <class A, int WIDTH, int KEYS, int GROUPS, class T>
DEVICE void consume(const TensorMap& o_map, const Problem& p, const Barriers& b, Shared<T> q, Shared<T> k, Shared<T> v) {
  const int group = warpgroup_id() - 1, t = warpgroup_thread();
  const int row = 64 * group + fragment_place(t, 0).row, column = fragment_place(t, 0).column;
  const Shared<T> own = q + group * A::kQueries;
  const Matrix<T, Major::k, 64> q_matrix(own);
  float s[KEYS / 2] = {}, o[WIDTH / 2], top[2], total[2], factor[2];
  uint32_t probabilities[KEYS / 4];

  const auto issue_scores = [&](int n) {
    const Matrix<T, Major::k, KEYS> k_matrix(k + n % kStages * A::kTile);
#pragma unroll
    for (int c = 0; c < WIDTH; c += 16) wgmma(s, q_matrix.at(0, c), k_matrix.at(0, c), c > 0);
    wgmma_commit();
  };
  const auto issue_output = [&](int n) {
    const Matrix<T, Major::mn, KEYS> v_matrix(v + n % kStages * A::kTile);
#pragma unroll
    for (int i = 0; i < KEYS; i += 16) wgmma(o, probabilities + i / 4, v_matrix.at(i, 0));
    wgmma_commit();
  };
  const auto release = [&](Shared<Mbarrier> empty, int n) {  // one thread of each warp: a wait speaks for its own warp alone
    if (t % 32 == 0) mbarrier_arrive(empty + n % kStages);
  };
  const auto wait_for_keys = [&](int n) { mbarrier_wait(b.k_full + n % kStages, n / kStages % 2); };
  const auto round = [&] {
#pragma unroll
    for (int i = 0; i < KEYS / 4; ++i) probabilities[i] = pack_rounded<T>(s[2 * i], s[2 * i + 1]);
  };

  if (group == GROUPS - 1) named_barrier_arrive(kTurn, 256);
  int n = 0;  // tiles of keys so far
  for (int index = block_x(), turn = 0; index < p.tiles; index += grid_x(), ++turn) {
    const Tile tile = tile_of<A::kRows, KEYS>(p, index);
#pragma unroll
    for (int i = 0; i < WIDTH / 2; ++i) o[i] = 0.0f;
    top[0] = top[1] = -INFINITY;
    total[0] = total[1] = 0.0f;
    const auto mask = [&](int i) {
      const int first = i * KEYS, all = minimum(p.keys, tile.query + 64 * group + p.diagonal + 1) - first;
      if (all >= KEYS) return;  // what the first row sees, all do
      int seen[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) seen[e] = minimum(p.keys, tile.query + row + 8 * e + p.diagonal + 1) - first - column;
      hide(s, seen);
    };

    mbarrier_wait(b.q_full, turn % 2);
    if (tile.key_tiles > 0) {
      wait_for_keys(n);
      wgmma_fence(s);
      issue_scores(n);
      wgmma_wait<0>(s);
      release(b.k_empty, n);
      mask(tile.key_tiles - 1);
      softmax_step(s, top, total, factor, p.scale_log2);
      round();
      if (tile.key_tiles > 1) wait_for_keys(n + 1);
      for (int i = tile.key_tiles - 2; i >= 0; --i, ++n) {
        named_barrier(kTurn + group, 256);
        wgmma_fence(s);
        issue_scores(n + 1);
        mbarrier_wait(b.v_full + n % kStages, n / kStages % 2);
        wgmma_fence(o, probabilities);
        issue_output(n);
        named_barrier_arrive(kTurn + (group + 1) % GROUPS, 256);
        wgmma_wait<1>(s);
        release(b.k_empty, n + 1);
        mask(i);
        softmax_step(s, top, total, factor, p.scale_log2);
        if (i > 0) wait_for_keys(n + 2);  // here: ptxas would move the next wait up to the last one, but not over a loop
        wgmma_wait<0>(o);
        release(b.v_empty, n);
#pragma unroll
        for (int j = 0; j < WIDTH / 2; ++j) o[j] *= factor[j / 2 % 2];
        round();
      }
      mbarrier_wait(b.v_full + n % kStages, n / kStages % 2);
      wgmma_fence(o, probabilities);
      issue_output(n);
      wgmma_wait<0>(o);
      release(b.v_empty, n);
      ++n;
    }

    // The output takes the place of this warpgroup's queries, when the products of all its warps are over, and a copy from there.
    named_barrier(kStore + group, 128);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      total[e] += shuffle_xor(total[e], 1);
      total[e] += shuffle_xor(total[e], 2);
      const float share = total[e] == 0.0f ? 0.0f : 1.0f / total[e];
      const int at = tile.query + row + 8 * e;
      if (column == 0 && at < p.queries) {
        const Global<float> lse = Global<float>(p.lse) + (static_cast<int64_t>(tile.batch) * p.heads + tile.head) * p.queries;
        lse[at] = fmaf(top[e], p.scale, fast_log2(total[e]) * 0.6931471805599453f);
      }
#pragma unroll
      for (int j = 0; j < WIDTH / 8; ++j) {
        const uint32_t byte = tile_byte(fragment_place(t, 2 * e).row, 8 * j + column, 64);
        pointer_cast<uint32_t>(own)[byte / 4] = pack_rounded<T>(o[4 * j + 2 * e] * share, o[4 * j + 2 * e + 1] * share);
      }
    }
    fence_async_shared();
    named_barrier(kStore + group, 128);
    if (t == 0) {
      for (int c = 0; c < WIDTH / 64; ++c) {
        tensor_store(o_map, {64 * c, tile.head, tile.query + 64 * group, tile.batch}, own + c * 64 * 64);
      }
      bulk_commit();
      bulk_wait_read<0>();
      mbarrier_arrive(b.q_empty);
    }
  }
}

template <class T, int WIDTH, int KEYS, int GROUPS>
KERNEL(128 * (GROUPS + 1), 1)
attention_fwd_kernel(GRID_CONSTANT(TensorMap) q_map, GRID_CONSTANT(TensorMap) k_map, GRID_CONSTANT(TensorMap) v_map,
                     GRID_CONSTANT(TensorMap) o_map, const Problem p) {
  if constexpr (kWgmma) {  // on other GPUs the launcher does not come here
    using A = Attention<T, WIDTH, KEYS, GROUPS>;
    const Shared<T> q = dynamic_shared<T>(), k = q + GROUPS * A::kQueries, v = k + kStages * A::kTile;
    SHARED_ARRAY(Mbarrier, barriers, 2 + 4 * kStages);
    const Barriers b{barriers, barriers + 1, barriers + 2, barriers + (2 + kStages), barriers + (2 + 2 * kStages),
                     barriers + (2 + 3 * kStages)};
    if (thread_id() == 0) {
      for (const TensorMap* map : {&q_map, &k_map, &v_map, &o_map}) prefetch_tensor_map(*map);
      mbarrier_init(b.q_full, 1);
      mbarrier_init(b.q_empty, GROUPS);
      for (int i = 0; i < kStages; ++i) {
        mbarrier_init(b.k_full + i, 1);
        mbarrier_init(b.v_full + i, 1);
        mbarrier_init(b.k_empty + i, 4 * GROUPS);
        mbarrier_init(b.v_empty + i, 4 * GROUPS);
      }
      fence_mbarrier_init();
    }
    block_barrier();
    if (warpgroup_id() == 0) {
      setmaxnreg_dec<GROUPS == 3 ? 32 : 24>();
      if (thread_id() == 0) produce<A, KEYS>(q_map, k_map, v_map, p, b, q, k, v);
    } else {
      setmaxnreg_inc<GROUPS == 3 ? 160 : 240>();
      consume<A, WIDTH, KEYS, GROUPS>(o_map, p, b, q, k, v);
    }
  }
}

template <class T, int WIDTH, int KEYS, int GROUPS>
int start(const fastlm_attention& a, void* stream) {
  using A = Attention<T, WIDTH, KEYS, GROUPS>;
  TensorMap q, k, v, o;
  const auto map = [&](TensorMap& m, const void* base, int64_t length, int64_t heads, const int64_t (&strides)[3], int rows) {
    return make_tensor_map<T>(m, static_cast<const T*>(base), {WIDTH, heads, length, a.batch},
                              {strides[2], strides[1], strides[0]}, {64, 1, rows, 1}, Swizzle::b128);
  };
  const int64_t row = a.heads * WIDTH, o_strides[3] = {a.queries * row, row, WIDTH};
  int error = map(q, a.q, a.queries, a.heads, a.q_strides, 64);
  if (error == 0) error = map(k, a.k, a.keys, a.kv_heads, a.k_strides, KEYS);
  if (error == 0) error = map(v, a.v, a.keys, a.kv_heads, a.v_strides, KEYS);
  if (error == 0) error = map(o, a.o, a.queries, a.heads, o_strides, 64);
  if (error) return error;
  Problem p{};
  p.lse = a.lse;
  p.batch = static_cast<int>(a.batch), p.queries = static_cast<int>(a.queries), p.keys = static_cast<int>(a.keys);
  p.heads = static_cast<int>(a.heads), p.group = static_cast<int>(a.heads / a.kv_heads);
  p.diagonal = static_cast<int>(maximum(-a.queries, minimum(a.diagonal, a.keys)));
  p.query_tiles = ceil_div(p.queries, A::kRows);
  const int64_t tiles = p.query_tiles * a.batch * a.heads;
  if (tiles > 0x7fffffff) return kInvalidValue;
  p.tiles = static_cast<int>(tiles);
  const int64_t kept = maximum<int64_t>(1, kCached / (4 * a.keys * WIDTH));  // heads' keys and values
  p.section = static_cast<int>(minimum(kept * p.group, a.batch * a.heads));
  p.scale = a.scale, p.scale_log2 = a.scale * 1.4426950408889634f;
  return launch(attention_fwd_kernel<T, WIDTH, KEYS, GROUPS>, Dim{minimum(p.tiles, a.programs)}, A::kThreads, A::kSharedBytes,
                stream, q, k, v, o, p);
}

template <class T>
int start_for(const fastlm_attention& a, void* stream) {
  switch (a.width) {
    case 64: return start<T, 64, 128, 3>(a, stream);
    case 128: return start<T, 128, 128, 2>(a, stream);
    case 256: return start<T, 256, 80, 2>(a, stream);
    default: return kInvalidValue;
  }
}

}  // namespace

extern "C" int fastlm_attention_fwd(const fastlm_attention* args, void* stream) {
  const fastlm_attention& a = *args;
  constexpr int64_t most = int64_t{1} << 29;  // a query's number and the diagonal are added in 32 bits
  if (a.batch < 1 || a.queries < 1 || a.queries >= most || a.keys < 1 || a.keys >= most || a.kv_heads < 1 ||
      a.heads % a.kv_heads != 0 || a.heads < 1 || a.programs < 1 || !(a.scale >= 0x1p-126f && a.scale <= 0x1p127f) ||
      a.batch * a.heads > 0x7fffffff) {
    return kInvalidValue;
  }
  if (!has_wgmma()) return kNotSupported;
  switch (a.dtype) {
    case FASTLM_BFLOAT16: return start_for<bf16>(a, stream);
    case FASTLM_FLOAT16: return start_for<fp16>(a, stream);
    default: return kInvalidValue;
  }
}
