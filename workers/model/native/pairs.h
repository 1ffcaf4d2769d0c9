// Products of bf16 with bf16 by AVX-512's vdpbf16ps: lanes are pairs of columns of the weight.
//
// Invariant: an output is accumulated in the order of its weight's columns, 32 at a time, in the 16
// lanes of one register, which are then summed as a tree; so it does not depend on what is computed
// beside it.
#pragma once
#include "attention.h"
#include "product.h"

struct Pairs {
  using Element = bf16;  // activations are taken as they are
  static constexpr int kStep = 32;

  static void multiply(const Chunk& chunk, int width, const Block<Element>& x, Product& product) {
    for (int g = 0; g < chunk.num_groups; g++)
      multiply(chunk.groups[g], width, x, product.out[0] + g * kGroup);
  }

  static void multiply(const Group& group, int width, const Block<Element>& x, float* out) {
    const int64_t stride = group.stride(width), step = group.step * stride;
    const Rows rows{group.bf16_rows(width), step, group.step == 1 ? kGroup * step : stride};
    if (group.count < kGroup) {
      for (int m = 0; m < x.num_rows; m++)
        for (int r = 0; r < group.count; r++)
          dots<1, 1, 0, 0>(rows.from(r), width, x.rows + m, out + m * kOutputs + r);
      return;
    }
    const int fours = x.num_rows / 4 * 4;
    int m = fours;
    for (int r = 0; fours && r < kGroup; r += 4) {
      // Fetching ahead is spread over the passes, for it must not wait for memory.
      float* to = out + r;
      if (fours == 4) {
        dots<4, 4, 0, 4>(rows.from(r), width, x.rows, to);
      } else if (fours == 8) {
        dots<4, 4, 0, 2>(rows.from(r), width, x.rows, to);
        dots<4, 4, 2, 4>(rows.from(r), width, x.rows + 4, to + 4 * kOutputs);
      } else {
        dots<4, 4, 0, 2>(rows.from(r), width, x.rows, to);
        dots<4, 4, 2, 3>(rows.from(r), width, x.rows + 4, to + 4 * kOutputs);
        dots<4, 4, 3, 4>(rows.from(r), width, x.rows + 8, to + 8 * kOutputs);
        if (fours == 16) dots<4, 4, 0, 0>(rows.from(r), width, x.rows + 12, to + 12 * kOutputs);
      }
    }
    if (m + 3 == x.num_rows) {
      for (int r = 0; r < kGroup; r += 4) {
        float* to = out + m * kOutputs + r;
        if (fours)
          dots<4, 3, 0, 0>(rows.from(r), width, x.rows + m, to);
        else
          dots<4, 3, 0, 4>(rows.from(r), width, x.rows + m, to);
      }
      return;
    }
    if (m + 2 == x.num_rows) {
      for (int r = 0; r < kGroup; r += 8) {
        float* to = out + m * kOutputs + r;
        if (fours)
          dots<8, 2, 0, 0>(rows.from(r), width, x.rows + m, to);
        else
          dots<8, 2, 0, 8>(rows.from(r), width, x.rows + m, to);
      }
      return;
    }
    if (m + 1 == x.num_rows) {
      float* to = out + m * kOutputs;
      if (m)
        dots<16, 1, 0, 0>(rows, width, x.rows + m, to);
      else
        dots<16, 1, 0, 16>(rows, width, x.rows + m, to);
    }
  }

 private:
  // What is fetched ahead while a row is read: its successor in the next group.
  struct Rows {
    const bf16* first;
    int64_t step, ahead;  // in elements

    Rows from(int r) const { return {first + r * step, step, ahead}; }
  };

  // R weight rows with M rows of activations: out[m * kOutputs + r]. Fetches ahead for the rows
  // [kFrom, kTo) of them.
  template <int R, int M, int kFrom, int kTo>
  static void dots(const Rows& weights, int width, const Element* const* x, float* out) {
    F sums[16];
    for (int i = 0; i < 16; i++) sums[i] = splat(0.f);
    const Element* rows[M];
    for (int m = 0; m < M; m++) rows[m] = x[m];
    int k = 0;
    for (; k + kStep <= width; k += kStep) {
      __m512bh inputs[M];
      for (int m = 0; m < M; m++) inputs[m] = (__m512bh)_mm512_loadu_si512(rows[m] + k);
      for (int r = 0; r < R; r++) {
        const bf16* at = weights.first + r * weights.step + k;
        const __m512bh w = (__m512bh)_mm512_loadu_si512(at);
        if (r >= kFrom && r < kTo) prefetch(at + weights.ahead);
        for (int m = 0; m < M; m++)
          sums[m * R + r] = _mm512_dpbf16_ps(sums[m * R + r], w, inputs[m]);
      }
    }
    if (k < width) {
      const __mmask32 there = (__mmask32(1) << (width - k)) - 1;
      for (int m = 0; m < M; m++) {
        const __m512bh input = (__m512bh)_mm512_loadu_si512(rows[m] + k);
        for (int r = 0; r < R; r++) {
          const bf16* at = weights.first + r * weights.step + k;
          const __m512bh w = (__m512bh)_mm512_maskz_loadu_epi16(there, at);
          sums[m * R + r] = _mm512_dpbf16_ps(sums[m * R + r], w, input);
        }
      }
    }
    alignas(64) float all[16];
    _mm512_store_ps(all, sums_of(sums));
    for (int m = 0; m < M; m++) memcpy(out + m * kOutputs, all + m * R, R * sizeof(float));
  }
};

// Attention by the same instruction: scores by pairs of a head's elements, values by pairs of tokens.
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
  static __m512bh pair_at(const bf16* p) {
    int32_t pair;
    memcpy(&pair, p, 4);
    return (__m512bh)_mm512_set1_epi32(pair);
  }

  template <int C>
  static void scores_of(const Query* queries, const Kept& kept, int num_keys, int head_dim,
                        float (*out)[kKeys]) {
    int key = 0;
    if (num_keys == kKeys) return scores_of<C, kKeys / kSlots>(queries, kept, head_dim, 0, out);
    for (; key + 2 * kSlots <= num_keys; key += 2 * kSlots)
      scores_of<C, 2>(queries, kept, head_dim, key, out);
    if (key < num_keys) scores_of<C, 1>(queries, kept, head_dim, key, out);
  }
  // C columns with 16 S keys from `key` on.
  template <int C, int S>
  static void scores_of(const Query* queries, const Kept& kept, int head_dim, int key,
                        float (*out)[kKeys]) {
    const int dims = padded(head_dim);
    const bf16* keys[S];
    for (int s = 0; s < S; s++) keys[s] = kept.keys[key / kSlots + s];
    F sums[C][S];
    for (int c = 0; c < C; c++)
      for (int s = 0; s < S; s++) sums[c][s] = splat(0.f);
    for (int d = 0; d < head_dim; d += 2) {
      __m512bh k[S];
      for (int s = 0; s < S; s++) k[s] = (__m512bh)_mm512_loadu_si512(keys[s] + d * kSlots);
      for (int c = 0; c < C; c++) {
        const __m512bh q = pair_at(queries + c * dims + d);
        for (int s = 0; s < S; s++) sums[c][s] = _mm512_dpbf16_ps(sums[c][s], k[s], q);
      }
    }
    for (int c = 0; c < C; c++)
      for (int s = 0; s < S; s++) store(out[c] + key + s * kSlots, sums[c][s]);
  }

  template <int C>
  static void add_to(const Weight (*weights)[kKeys], const Kept& kept, int num_keys, int head_dim,
                     float* output) {
    int d = 0;
    for (; d + 64 <= head_dim; d += 64) add_to<C, 4>(weights, kept, num_keys, head_dim, d, output);
    for (; d < head_dim; d += 16) add_to<C, 1>(weights, kept, num_keys, head_dim, d, output);
  }
  // 16 D elements of C columns, from element `d` on; fewer where the head has no more.
  template <int C, int D>
  static void add_to(const Weight (*weights)[kKeys], const Kept& kept, int num_keys, int head_dim,
                     int d, float* output) {
    const int dims = padded(head_dim);
    const __mmask16 there = head_dim - d >= 16 ? __mmask16(~0u) : __mmask16((1u << (head_dim - d)) - 1);
    F sums[C][D];
    for (int c = 0; c < C; c++)
      for (int i = 0; i < D; i++) sums[c][i] = load(output + c * dims + d + 16 * i);
    for (int key = 0; key < num_keys; key += kSlots) {
      const bf16* values = kept.values[key / kSlots] + 2 * d;
      const int pairs = num_keys - key < kSlots ? (num_keys - key + 1) / 2 : kSlots / 2;
      for (int pair = 0; pair < pairs; pair++) {
        __m512bh v[D];
        for (int i = 0; i < D; i++) {
          const bf16* at = values + pair * 2 * head_dim + 32 * i;
          v[i] = D == 1 ? (__m512bh)_mm512_maskz_loadu_epi32(there, at)
                        : (__m512bh)_mm512_loadu_si512(at);
        }
        for (int c = 0; c < C; c++) {
          const __m512bh p = pair_at(weights[c] + key + 2 * pair);
          for (int i = 0; i < D; i++) sums[c][i] = _mm512_dpbf16_ps(sums[c][i], v[i], p);
        }
      }
    }
    for (int c = 0; c < C; c++)
      for (int i = 0; i < D; i++) store(output + c * dims + d + 16 * i, sums[c][i]);
  }
};
