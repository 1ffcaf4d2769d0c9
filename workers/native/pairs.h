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
    for (int g = 0; g < chunk.num_groups; g++) {
      const Group& group = chunk.groups[g];
      const bf16* weight = group.bf16_rows(width);
      float* out = product.out[0] + g * kGroup;
      if (group.count < kGroup) {
        for (int m = 0; m < x.num_rows; m++)
          for (int r = 0; r < group.count; r++)
            dots<1, 1>(weight + int64_t(r) * width, width, x.rows + m, out + m * kOutputs + r);
        continue;
      }
      int m = 0;
      for (; m + 4 <= x.num_rows; m += 4)
        for (int r = 0; r < kGroup; r += 4)
          dots<4, 4>(weight + int64_t(r) * width, width, x.rows + m, out + m * kOutputs + r);
      if (m + 2 <= x.num_rows) {
        for (int r = 0; r < kGroup; r += 8)
          dots<8, 2>(weight + int64_t(r) * width, width, x.rows + m, out + m * kOutputs + r);
        m += 2;
      }
      if (m < x.num_rows) dots<16, 1>(weight, width, x.rows + m, out + m * kOutputs);
    }
  }

 private:
  // R weight rows with M rows of activations: out[m * kOutputs + r].
  template <int R, int M>
  static void dots(const bf16* weight, int width, const Element* const* x, float* out) {
    F sums[16];
    for (int i = 0; i < 16; i++) sums[i] = splat(0.f);
    const Element* rows[M];
    for (int m = 0; m < M; m++) rows[m] = x[m];
    int k = 0;
    for (; k + kStep <= width; k += kStep) {
      __m512bh inputs[M];
      for (int m = 0; m < M; m++) inputs[m] = (__m512bh)_mm512_loadu_si512(rows[m] + k);
      for (int r = 0; r < R; r++) {
        const bf16* at = weight + int64_t(r) * width + k;
        const __m512bh w = (__m512bh)_mm512_loadu_si512(at);
        prefetch(at + int64_t(kGroup) * width);
        for (int m = 0; m < M; m++)
          sums[m * R + r] = _mm512_dpbf16_ps(sums[m * R + r], w, inputs[m]);
      }
    }
    if (k < width) {
      const __mmask32 there = (__mmask32(1) << (width - k)) - 1;
      for (int m = 0; m < M; m++) {
        const __m512bh input = (__m512bh)_mm512_loadu_si512(rows[m] + k);
        for (int r = 0; r < R; r++) {
          const bf16* at = weight + int64_t(r) * width + k;
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

// Attention by the same instruction: scores by pairs of a head's elements, values by pairs of keys.
struct PairsAttention {
  using Query = bf16;   // [column][dims]
  using Key = bf16;     // of 16 keys: paired
  using Value = bf16;   // [key / 2][dims][2]
  using Weight = bf16;  // [column][key]

  static constexpr int kKeyStep = 16;

  static void load_queries(const bf16* const rows[kRows], int columns, int head_dim, Query* to) {
    const int dims = padded(head_dim);
    for (int c = 0; c < columns; c++) {
      memcpy(to + c * dims, rows[c], size_t(head_dim) * 2);
      memset(to + c * dims + head_dim, 0, size_t(dims - head_dim) * 2);
    }
  }

  static void load_keys(const bf16* keys, int head_dim, Key* to) {
    const bf16* rows[kRows];
    for (int i = 0; i < kRows; i++) rows[i] = keys + i * head_dim;
    pair_rows(rows, head_dim, to);
  }

  static void load_values(const bf16* values, int count, int head_dim, Value* to, int key) {
    alignas(64) static constexpr uint16_t upper[32] = {
        16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
        24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
    const __m512i high = _mm512_load_si512(upper);
    const __m512i low = _mm512_sub_epi16(high, _mm512_set1_epi16(16));
    const int dims = padded(head_dim);
    for (int pair = 0; pair < 8; pair++)
      for (int d = 0; d < dims; d += 32) {
        const __mmask32 there = head_dim - d >= 32 ? ~0u : (1u << (head_dim - d)) - 1;
        const bf16* at = values + 2 * pair * head_dim + d;
        __m512i x = _mm512_setzero_si512(), y = x;
        if (2 * pair < count) x = _mm512_maskz_loadu_epi16(there, at);
        if (2 * pair + 1 < count) y = _mm512_maskz_loadu_epi16(there, at + head_dim);
        Value* out = to + (key / 2 + pair) * 2 * dims + 2 * d;
        _mm512_storeu_si512(out, _mm512_permutex2var_epi16(x, low, y));
        _mm512_storeu_si512(out + 32, _mm512_permutex2var_epi16(x, high, y));
      }
  }

  static void scores(const Query* queries, int columns, const Key* keys, int num_keys, int head_dim,
                     float (*out)[kKeys]) {
    const int dims = padded(head_dim);
    int c = 0;
    for (; c + 4 <= columns; c += 4)
      scores_of<4>(queries + c * dims, keys, num_keys, dims, out + c);
    switch (columns - c) {
      case 3: return scores_of<3>(queries + c * dims, keys, num_keys, dims, out + c);
      case 2: return scores_of<2>(queries + c * dims, keys, num_keys, dims, out + c);
      case 1: return scores_of<1>(queries + c * dims, keys, num_keys, dims, out + c);
    }
  }

  static void store_weights(Weight* to, F p) { store16(to, p); }

  static void add_values(const Weight (*weights)[kKeys], int columns, const Value* values,
                         int num_keys, int dims, float* output) {
    int c = 0;
    for (; c + 4 <= columns; c += 4)
      add_to<4>(weights + c, values, num_keys, dims, output + c * dims);
    switch (columns - c) {
      case 3: return add_to<3>(weights + c, values, num_keys, dims, output + c * dims);
      case 2: return add_to<2>(weights + c, values, num_keys, dims, output + c * dims);
      case 1: return add_to<1>(weights + c, values, num_keys, dims, output + c * dims);
    }
  }

 private:
  static __m512bh pair_at(const bf16* p) {
    int32_t pair;
    memcpy(&pair, p, 4);
    return (__m512bh)_mm512_set1_epi32(pair);
  }

  template <int C>
  static void scores_of(const Query* queries, const Key* keys, int num_keys, int dims,
                        float (*out)[kKeys]) {
    int key = 0;
    for (; key + 32 <= num_keys; key += 32) scores_of<C, 2>(queries, keys, dims, key, out);
    if (key < num_keys) scores_of<C, 1>(queries, keys, dims, key, out);
  }
  // C columns with 16 S keys from `key` on.
  template <int C, int S>
  static void scores_of(const Query* queries, const Key* keys, int dims, int key,
                        float (*out)[kKeys]) {
    F sums[C][S];
    for (int c = 0; c < C; c++)
      for (int s = 0; s < S; s++) sums[c][s] = splat(0.f);
    const Key* at = keys + key * dims;
    for (int d = 0; d < dims; d += 2) {
      __m512bh k[S];
      for (int s = 0; s < S; s++)
        k[s] = (__m512bh)_mm512_loadu_si512(at + s * 16 * dims + d * 16);
      for (int c = 0; c < C; c++) {
        const __m512bh q = pair_at(queries + c * dims + d);
        for (int s = 0; s < S; s++) sums[c][s] = _mm512_dpbf16_ps(sums[c][s], k[s], q);
      }
    }
    for (int c = 0; c < C; c++)
      for (int s = 0; s < S; s++) store(out[c] + key + s * 16, sums[c][s]);
  }

  template <int C>
  static void add_to(const Weight (*weights)[kKeys], const Value* values, int num_keys, int dims,
                     float* output) {
    int d = 0;
    for (; d + 64 <= dims; d += 64) add_to<C, 4>(weights, values, num_keys, dims, d, output);
    if (d < dims) add_to<C, 2>(weights, values, num_keys, dims, d, output);
  }
  // 16 D elements of C columns, from element `d` on.
  template <int C, int D>
  static void add_to(const Weight (*weights)[kKeys], const Value* values, int num_keys, int dims,
                     int d, float* output) {
    F sums[C][D];
    for (int c = 0; c < C; c++)
      for (int i = 0; i < D; i++) sums[c][i] = load(output + c * dims + d + 16 * i);
    for (int pair = 0; pair < num_keys / 2; pair++) {
      __m512bh v[D];
      for (int i = 0; i < D; i++)
        v[i] = (__m512bh)_mm512_loadu_si512(values + pair * 2 * dims + 2 * (d + 16 * i));
      for (int c = 0; c < C; c++) {
        const __m512bh p = pair_at(weights[c] + 2 * pair);
        for (int i = 0; i < D; i++) sums[c][i] = _mm512_dpbf16_ps(sums[c][i], v[i], p);
      }
    }
    for (int c = 0; c < C; c++)
      for (int i = 0; i < D; i++) store(output + c * dims + d + 16 * i, sums[c][i]);
  }
};
