// Products in fp32 with fused multiply and add: weights are widened on the way, activations before.
//
// Invariant: an output is accumulated in the order of its weight's columns, kLanes at a time, in the
// lanes of one register, which are then summed as a tree; so it does not depend on what is computed
// beside it.
#pragma once
#include "attention.h"
#include "product.h"

struct Floats {
  using Element = float;  // activations are widened once for all products

  static void multiply(const Chunk& chunk, int width, const Block<Element>& x, Product& product) {
    for (int g = 0; g < chunk.num_groups; g++)
      multiply(chunk.groups[g], width, x, product.out[0] + g * kGroup);
  }

 private:
  struct Rows {
    const bf16* first;
    int64_t step, ahead;  // in elements

    Rows from(int r) const { return {first + r * step, step, ahead}; }
  };

  static void multiply(const Group& group, int width, const Block<Element>& x, float* out) {
    const int64_t stride = group.stride(width), step = group.step * stride;
    const Rows rows{group.bf16_rows(width), step, group.step == 1 ? kGroup * step : stride};
    if (group.count < kGroup) {
      for (int m = 0; m < x.num_rows; m++)
        for (int r = 0; r < group.count; r++)
          dots<1, 1, false>(rows.from(r), width, x.rows + m, out + m * kOutputs + r);
      return;
    }
    const int fours = x.num_rows / 4 * 4;
    int m = fours;
    for (int r = 0; fours && r < kGroup; r += kLanes / 4) {
      dots<kLanes / 4, 4, true>(rows.from(r), width, x.rows, out + r);
      for (int n = 4; n < fours; n += 4)
        dots<kLanes / 4, 4, false>(rows.from(r), width, x.rows + n, out + n * kOutputs + r);
    }
    if (m + 2 <= x.num_rows) {
      for (int r = 0; r < kGroup; r += kLanes / 2)
        dots<kLanes / 2, 2, true>(rows.from(r), width, x.rows + m, out + m * kOutputs + r);
      m += 2;
    }
    if (m < x.num_rows)
      for (int r = 0; r < kGroup; r += kLanes)
        dots<kLanes, 1, true>(rows.from(r), width, x.rows + m, out + m * kOutputs + r);
  }

  // R weight rows with M rows of activations: out[m * kOutputs + r].
  template <int R, int M, bool kFetches>
  static void dots(const Rows& weights, int width, const Element* const* x, float* out) {
    F sums[kLanes];
    for (int i = 0; i < kLanes; i++) sums[i] = splat(0.f);
    const Element* rows[M];
    for (int m = 0; m < M; m++) rows[m] = x[m];
    int k = 0;
    for (; k + kLanes <= width; k += kLanes) {
      F inputs[M];
      for (int m = 0; m < M; m++) inputs[m] = load(rows[m] + k);
      for (int r = 0; r < R; r++) {
        const bf16* at = weights.first + r * weights.step + k;
        const F w = load16(at);
        if (kFetches && k % 32 == 0) prefetch(at + weights.ahead);
        for (int m = 0; m < M; m++) sums[m * R + r] = fma(w, inputs[m], sums[m * R + r]);
      }
    }
    if (k < width)
      for (int m = 0; m < M; m++)
        for (int r = 0; r < R; r++) {
          const F w = load16(weights.first + r * weights.step + k, width - k);
          sums[m * R + r] = fma(w, load(rows[m] + k), sums[m * R + r]);
        }
    alignas(64) float all[kLanes];
    store(all, sums_of(sums));
    for (int m = 0; m < M; m++) memcpy(out + m * kOutputs, all + m * R, R * sizeof(float));
  }
};

// Attention in fp32: a lane is a key for scores, an element of a head for values.
struct FloatsAttention {
  using Query = float;   // [column][padded(head_dim)]
  using Weight = float;  // [column][key]
  struct Arranged {};
  static constexpr int kKeyStep = kSlots;
  static constexpr bool kFetches = false;
  static bool reads_sections(int, const SectionFormat&) { return false; }

  static void load_queries(const bf16* const rows[kRows], int columns, int head_dim, Query* to) {
    const int dims = padded(head_dim);
    for (int c = 0; c < columns; c++)
      for (int d = 0; d < head_dim; d += kLanes)
        store(to + c * dims + d, load16(rows[c] + d, head_dim - d));
  }

  static void arrange(const Kept&, int, int, Arranged&) {}

  static void scores(const Query* queries, int columns, const Kept& kept, int num_keys,
                     int head_dim, float (*out)[kKeys]) {
    const int dims = padded(head_dim);
    for (int key = 0; key < num_keys; key += kSlots) {
      const bf16* keys = kept.keys[key / kSlots];
      int c = 0;
      for (; c + kColumns <= columns; c += kColumns)
        scores_of<kColumns>(queries + c * dims, keys, head_dim, key, out + c);
      for (; c + 2 <= columns; c += 2)
        scores_of<2>(queries + c * dims, keys, head_dim, key, out + c);
      for (; c < columns; c++) scores_of<1>(queries + c * dims, keys, head_dim, key, out + c);
    }
  }

  static void store_weights(Weight* to, F p) { store(to, p); }

  static void add_values(const Weight (*weights)[kKeys], int columns, const Kept& kept,
                         const Arranged&, int num_keys, int head_dim, float* output) {
    const int dims = padded(head_dim);
    int c = 0;
    for (; c + kColumns <= columns; c += kColumns)
      add_to<kColumns, 2>(weights + c, kept, num_keys, head_dim, output + c * dims);
    for (; c + 2 <= columns; c += 2)
      add_to<2, 4>(weights + c, kept, num_keys, head_dim, output + c * dims);
    for (; c < columns; c++)
      add_to<1, 4>(weights + c, kept, num_keys, head_dim, output + c * dims);
  }

 private:
  static constexpr int kColumns = 4;                    // at a time, where there are as many
  static constexpr int kVectors = kSlots / kLanes;  // of keys that lie together

  // The elements of a pair, from kLanes pairs beside each other.
  static F first(Int pairs) { return (F)(pairs << 16); }
  static F second(Int pairs) { return (F)(pairs & int32_t(0xffff0000)); }
  static Int load_pairs(const bf16* p) {
    Int pairs;
    memcpy(&pairs, p, sizeof pairs);
    return pairs;
  }
  static Int load_pairs(const bf16* p, int count) {
    if (count >= kLanes) return load_pairs(p);
    Int pairs = {};
    memcpy(&pairs, p, size_t(count) * 4);
    return pairs;
  }

  template <int C>
  static void scores_of(const Query* queries, const bf16* keys, int head_dim, int key,
                        float (*out)[kKeys]) {
    const int dims = padded(head_dim);
    F sums[C][kVectors];
    for (int c = 0; c < C; c++)
      for (int i = 0; i < kVectors; i++) sums[c][i] = splat(0.f);
    for (int d = 0; d < head_dim; d += 2)
      for (int i = 0; i < kVectors; i++) {
        const Int pairs = load_pairs(keys + d * kSlots + 2 * i * kLanes);
        const F a = first(pairs), b = second(pairs);
        for (int c = 0; c < C; c++) {
          sums[c][i] = fma(a, splat(queries[c * dims + d]), sums[c][i]);
          sums[c][i] = fma(b, splat(queries[c * dims + d + 1]), sums[c][i]);
        }
      }
    for (int c = 0; c < C; c++)
      for (int i = 0; i < kVectors; i++) store(out[c] + key + i * kLanes, sums[c][i]);
  }

  // D vectors at a time.
  template <int C, int D>
  static void add_to(const Weight (*weights)[kKeys], const Kept& kept, int num_keys, int head_dim,
                     float* output) {
    int d = 0;
    for (; d + D * kLanes <= head_dim; d += D * kLanes)
      add_vectors<C, D>(weights, kept, num_keys, head_dim, d, output);
    for (; d < head_dim; d += kLanes)
      add_vectors<C, 1>(weights, kept, num_keys, head_dim, d, output);
  }
  template <int C, int D>
  static void add_vectors(const Weight (*weights)[kKeys], const Kept& kept, int num_keys,
                          int head_dim, int d, float* output) {
    const int dims = padded(head_dim);
    F sums[C][D];
    for (int c = 0; c < C; c++)
      for (int i = 0; i < D; i++) sums[c][i] = load(output + c * dims + d + kLanes * i);
    for (int key = 0; key < num_keys; key += 2) {
      const bf16* values = kept.values[key / kSlots] + key % kSlots * head_dim + 2 * d;
      for (int i = 0; i < D; i++) {
        const bf16* at = values + 2 * kLanes * i;
        const Int pairs = D == 1 ? load_pairs(at, head_dim - d) : load_pairs(at);
        const F a = first(pairs), b = second(pairs);
        for (int c = 0; c < C; c++) {
          sums[c][i] = fma(a, splat(weights[c][key]), sums[c][i]);
          sums[c][i] = fma(b, splat(weights[c][key + 1]), sums[c][i]);
        }
      }
    }
    for (int c = 0; c < C; c++)
      for (int i = 0; i < D; i++) store(output + c * dims + d + kLanes * i, sums[c][i]);
  }
};
