#pragma once

#include "fastlm.h"

// The most places of a row: numbers of keys, and a tile beyond them, stay in 32 bits.
#define FASTLM_DECODE_ATTENTION_PLACES 0x7fff0000

// Attention of S new tokens to a row over a cache of keys and values, contiguous or paged. See fastlm/ops/decode_attention.py.
typedef struct {
  const void* q;            // [B, S, H, key_width] at q_strides, elements one behind the other
  const void* k;            // [pages, page_size, H_kv, key_width]; without page_table [B, page_size, ...], page_size = T_max
  const void* v;            // [pages, page_size, H_kv, value_width]
  const void* lengths;      // [B]
  const void* page_table;   // [B, max_pages] or null; its lines lie table_stride apart
  const void* key_starts;   // [B] or null
  const float* alibi_slopes;  // [H] or null
  const void* distances;    // [H, 2 * reach + 1] or null
  const void* sinks;        // [H] or null
  void* o;                  // [B, S, H, value_width]
  float* lse;               // [B, H, S]
  float* partial;           // splits > 1: [splits, B * S * H, value_width], and
  float* stats;             // [splits, B * S * H, 2], and
  unsigned* counters;       // fastlm_decode_attention_blocks() of them; cleared here
  int64_t q_strides[3], k_strides[4], v_strides[4];
  int64_t table_stride, pages;
  int32_t B, S, H, H_kv, key_width, value_width;
  int32_t page_size, max_pages;  // page_size * max_pages <= FASTLM_DECODE_ATTENTION_PLACES
  int32_t reach;
  int32_t left;             // keys seen before a query's own, -1 for all
  int32_t splits;           // shares a row's keys are cut into, at least 1
  int32_t least;            // keys below which a share is not cut, at least 1
  int32_t dtype;            // fastlm_dtype of q, k, v, o
  int32_t distances_dtype, sinks_dtype;
  int32_t wide_lengths, wide_table, wide_starts;  // int64 instead of int32
  float scale, softcap;     // softcap 0 for none
} fastlm_decode_attention;

FASTLM_LAUNCHER fastlm_decode_attention_fwd(const fastlm_decode_attention* args, void* stream);

// How many blocks one share of a call takes, and so how many counters; `per_sm`, unless null: how many of them an SM holds.
FASTLM_LAUNCHER fastlm_decode_attention_blocks(const fastlm_decode_attention* args, int32_t* per_sm);

// How many shares to cut keys into, `most` at most: the smallest number at which blocks on `slots` places (the blocks that all
// SMs hold) leave few of them idle in the last round.
FASTLM_LAUNCHER fastlm_decode_attention_splits(int64_t blocks, int64_t most, int64_t slots);
