// Attention by products of pairs: scores by pairs of a head's elements, values by pairs of tokens.
#pragma once
#include <type_traits>

#include "attention.h"
#include "pair_vector.h"

struct PairsAttention {
  using Query = bf16;   // [column][padded(head_dim)]
  using Weight = bf16;  // [column][key]
  struct Arranged {};
  static constexpr int kKeyStep = kSlots;
  static constexpr bool kFetches = true;

  static void load_queries(const bf16* const rows[kRows], int columns, int head_dim, Query* to) {
    const int dims = padded(head_dim);
    for (int c = 0; c < columns; c++) memcpy(to + c * dims, rows[c], size_t(head_dim) * 2);
  }

  static void arrange(const Kept&, int, int, Arranged&) {}

  static void scores(const Query* queries, int columns, const Kept& kept, int num_keys,
                     int head_dim, float (*out)[kKeys]) {
    const int dims = padded(head_dim);
    by_fours(columns, kept.fetches, [&](auto num_columns, auto fetches, int c) {
      scores_of<num_columns, fetches>(queries + c * dims, kept, num_keys, head_dim, out + c);
    });
  }

  static void store_weights(Weight* to, F p) { store16(to, p); }

  static void add_values(const Weight (*weights)[kKeys], int columns, const Kept& kept,
                         const Arranged&, int num_keys, int head_dim, float* output) {
    const int dims = padded(head_dim);
    by_fours(columns, kept.fetches, [&](auto num_columns, auto fetches, int c) {
      add_to<num_columns, fetches>(weights + c, kept, num_keys, head_dim, output + c * dims);
    });
  }

 private:
  static constexpr int kVectors = kSlots / kLanes;  // of keys that lie together
  static constexpr int kTogether = kLanes / 4;      // such groups of keys, as far as registers go

  // Calls call(num_columns, fetches, first column) for four columns at a time, and for those left. The
  // first call fetches, if any is to.
  template <class Call>
  static void by_fours(int columns, bool fetches, Call call) {
    if (!fetches) return by_fours<false>(0, columns, call);
    few<true>(0, std::min(columns, 4), call);
    by_fours<false>(4, columns, call);
  }
  template <bool kFetch, class Call>
  static void by_fours(int from, int columns, Call call) {
    for (int c = from; c < columns; c += 4) few<kFetch>(c, std::min(columns - c, 4), call);
  }
  template <bool kFetch, class Call>
  static void few(int from, int count, Call call) {
    const std::bool_constant<kFetch> fetches;
    switch (count) {
      case 4: return call(std::integral_constant<int, 4>(), fetches, from);
      case 3: return call(std::integral_constant<int, 3>(), fetches, from);
      case 2: return call(std::integral_constant<int, 2>(), fetches, from);
      case 1: return call(std::integral_constant<int, 1>(), fetches, from);
    }
  }

  template <int C, bool kFetch>
  static void scores_of(const Query* queries, const Kept& kept, int num_keys, int head_dim,
                        float (*out)[kKeys]) {
    int key = 0;
    for (; key + kTogether * kSlots <= num_keys; key += kTogether * kSlots)
      scores_of<C, kTogether, kFetch>(queries, kept, head_dim, key, out);
    if constexpr (kTogether > 1) {
      for (; key + 2 * kSlots <= num_keys; key += 2 * kSlots)
        scores_of<C, 2, kFetch>(queries, kept, head_dim, key, out);
      if (key < num_keys) scores_of<C, 1, kFetch>(queries, kept, head_dim, key, out);
    }
  }
  // C columns with S groups of keys from `key` on.
  template <int C, int S, bool kFetch>
  static void scores_of(const Query* queries, const Kept& kept, int head_dim, int key,
                        float (*out)[kKeys]) {
    constexpr int kAll = S * kVectors;
    const int dims = padded(head_dim);
    const bf16* keys[S];
    for (int s = 0; s < S; s++) keys[s] = kept.keys[key / kSlots + s];
    F sums[C][kAll];
    UNROLLED for (int c = 0; c < C; c++)
      UNROLLED for (int i = 0; i < kAll; i++) sums[c][i] = splat(0.f);
    for (int d = 0; d < head_dim; d += 2) {
      PairVector k[kAll];
      UNROLLED for (int i = 0; i < kAll; i++) {
        const int at = d * kSlots + 2 * kLanes * (i % kVectors);
        k[i] = load_pairs(keys[i / kVectors] + at);
        if (kFetch) prefetch(kept.next_keys[key / kSlots + i / kVectors] + at);
      }
      UNROLLED for (int c = 0; c < C; c++) {
        const PairVector q = splat_pair(queries + c * dims + d);
        UNROLLED for (int i = 0; i < kAll; i++) sums[c][i] = add_products(sums[c][i], k[i], q);
      }
    }
    UNROLLED for (int c = 0; c < C; c++)
      UNROLLED for (int i = 0; i < kAll; i++) store(out[c] + key + i * kLanes, sums[c][i]);
  }

  template <int C, bool kFetch>
  static void add_to(const Weight (*weights)[kKeys], const Kept& kept, int num_keys, int head_dim,
                     float* output) {
    int d = 0;
    for (; d + 4 * kLanes <= head_dim; d += 4 * kLanes)
      add_to<C, 4, kFetch>(weights, kept, num_keys, head_dim, d, output);
    for (; d < head_dim; d += kLanes) add_to<C, 1, kFetch>(weights, kept, num_keys, head_dim, d, output);
  }
  // D vectors of C columns, from element `d` on; of a single one what the head has.
  template <int C, int D, bool kFetch>
  static void add_to(const Weight (*weights)[kKeys], const Kept& kept, int num_keys, int head_dim,
                     int d, float* output) {
    const int dims = padded(head_dim);
    F sums[C][D];
    UNROLLED for (int c = 0; c < C; c++)
      UNROLLED for (int i = 0; i < D; i++) sums[c][i] = load(output + c * dims + d + kLanes * i);
    for (int key = 0; key < num_keys; key += kSlots) {
      const bf16* values = kept.values[key / kSlots] + 2 * d;
      const bf16* next = kept.next_values[key / kSlots] + 2 * d;
      const int pairs = num_keys - key < kSlots ? (num_keys - key + 1) / 2 : kSlots / 2;
      for (int pair = 0; pair < pairs; pair++) {
        PairVector v[D];
        UNROLLED for (int i = 0; i < D; i++) {
          const int at = pair * 2 * head_dim + 2 * kLanes * i;
          v[i] = D == 1 ? load_pairs(values + at, head_dim - d) : load_pairs(values + at);
          if (kFetch) prefetch(next + at);
        }
        UNROLLED for (int c = 0; c < C; c++) {
          const PairVector p = splat_pair(weights[c] + key + 2 * pair);
          UNROLLED for (int i = 0; i < D; i++) sums[c][i] = add_products(sums[c][i], v[i], p);
        }
      }
    }
    UNROLLED for (int c = 0; c < C; c++)
      UNROLLED for (int i = 0; i < D; i++) store(output + c * dims + d + kLanes * i, sums[c][i]);
  }
};
