// Attention by products of pairs: scores by pairs of a head's elements, values by pairs of tokens.
#pragma once
#include "attention.h"
#include "pair_vector.h"

struct PairsAttention {
  using Query = bf16;   // [column][padded(head_dim)]
  using Weight = bf16;  // [column][key]
  struct Arranged {};
  static constexpr int kKeyStep = kSlots;

  static void load_queries(const bf16* const rows[kRows], int columns, int head_dim, Query* to) {
    const int dims = padded(head_dim);
    for (int c = 0; c < columns; c++) memcpy(to + c * dims, rows[c], size_t(head_dim) * 2);
  }

  static void arrange(const Kept&, int, int, Arranged&) {}

  static void scores(const Query* queries, int columns, const Kept& kept, int num_keys,
                     int head_dim, float (*out)[kKeys]) {
    const int dims = padded(head_dim);
    int c = 0;
    for (; c + 4 <= columns; c += 4)
      scores_of<4>(queries + c * dims, kept, num_keys, head_dim, out + c);
    switch (columns - c) {
      case 3: return scores_of<3>(queries + c * dims, kept, num_keys, head_dim, out + c);
      case 2: return scores_of<2>(queries + c * dims, kept, num_keys, head_dim, out + c);
      case 1: return scores_of<1>(queries + c * dims, kept, num_keys, head_dim, out + c);
    }
  }

  static void store_weights(Weight* to, F p) { store16(to, p); }

  static void add_values(const Weight (*weights)[kKeys], int columns, const Kept& kept,
                         const Arranged&, int num_keys, int head_dim, float* output) {
    const int dims = padded(head_dim);
    int c = 0;
    for (; c + 4 <= columns; c += 4)
      add_to<4>(weights + c, kept, num_keys, head_dim, output + c * dims);
    switch (columns - c) {
      case 3: return add_to<3>(weights + c, kept, num_keys, head_dim, output + c * dims);
      case 2: return add_to<2>(weights + c, kept, num_keys, head_dim, output + c * dims);
      case 1: return add_to<1>(weights + c, kept, num_keys, head_dim, output + c * dims);
    }
  }

 private:
  static constexpr int kVectors = kSlots / kLanes;  // of keys that lie together
  static constexpr int kTogether = kLanes / 4;      // such groups of keys, as far as registers go

  template <int C>
  static void scores_of(const Query* queries, const Kept& kept, int num_keys, int head_dim,
                        float (*out)[kKeys]) {
    int key = 0;
    for (; key + kTogether * kSlots <= num_keys; key += kTogether * kSlots)
      scores_of<C, kTogether>(queries, kept, head_dim, key, out);
    if constexpr (kTogether > 1) {
      for (; key + 2 * kSlots <= num_keys; key += 2 * kSlots)
        scores_of<C, 2>(queries, kept, head_dim, key, out);
      if (key < num_keys) scores_of<C, 1>(queries, kept, head_dim, key, out);
    }
  }
  // C columns with S groups of keys from `key` on.
  template <int C, int S>
  static void scores_of(const Query* queries, const Kept& kept, int head_dim, int key,
                        float (*out)[kKeys]) {
    constexpr int kAll = S * kVectors;
    const int dims = padded(head_dim);
    const bf16* keys[S];
    for (int s = 0; s < S; s++) keys[s] = kept.keys[key / kSlots + s];
    F sums[C][kAll];
    for (int c = 0; c < C; c++)
      for (int i = 0; i < kAll; i++) sums[c][i] = splat(0.f);
    for (int d = 0; d < head_dim; d += 2) {
      PairVector k[kAll];
      for (int i = 0; i < kAll; i++)
        k[i] = load_pairs(keys[i / kVectors] + d * kSlots + 2 * kLanes * (i % kVectors));
      for (int c = 0; c < C; c++) {
        const PairVector q = splat_pair(queries + c * dims + d);
        for (int i = 0; i < kAll; i++) sums[c][i] = add_products(sums[c][i], k[i], q);
      }
    }
    for (int c = 0; c < C; c++)
      for (int i = 0; i < kAll; i++) store(out[c] + key + i * kLanes, sums[c][i]);
  }

  template <int C>
  static void add_to(const Weight (*weights)[kKeys], const Kept& kept, int num_keys, int head_dim,
                     float* output) {
    int d = 0;
    for (; d + 4 * kLanes <= head_dim; d += 4 * kLanes)
      add_to<C, 4>(weights, kept, num_keys, head_dim, d, output);
    for (; d < head_dim; d += kLanes) add_to<C, 1>(weights, kept, num_keys, head_dim, d, output);
  }
  // D vectors of C columns, from element `d` on; of a single one what the head has.
  template <int C, int D>
  static void add_to(const Weight (*weights)[kKeys], const Kept& kept, int num_keys, int head_dim,
                     int d, float* output) {
    const int dims = padded(head_dim);
    F sums[C][D];
    for (int c = 0; c < C; c++)
      for (int i = 0; i < D; i++) sums[c][i] = load(output + c * dims + d + kLanes * i);
    for (int key = 0; key < num_keys; key += kSlots) {
      const bf16* values = kept.values[key / kSlots] + 2 * d;
      const int pairs = num_keys - key < kSlots ? (num_keys - key + 1) / 2 : kSlots / 2;
      for (int pair = 0; pair < pairs; pair++) {
        PairVector v[D];
        for (int i = 0; i < D; i++) {
          const bf16* at = values + pair * 2 * head_dim + 2 * kLanes * i;
          v[i] = D == 1 ? load_pairs(at, head_dim - d) : load_pairs(at);
        }
        for (int c = 0; c < C; c++) {
          const PairVector p = splat_pair(weights[c] + key + 2 * pair);
          for (int i = 0; i < D; i++) sums[c][i] = add_products(sums[c][i], v[i], p);
        }
      }
    }
    for (int c = 0; c < C; c++)
      for (int i = 0; i < D; i++) store(output + c * dims + d + kLanes * i, sums[c][i]);
  }
};
