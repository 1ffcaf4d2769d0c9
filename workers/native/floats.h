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

  static void widen_row(const bf16* from, int width, float* to) {
    for (int k = 0; k < padded(width); k += kLanes) store(to + k, load16(from + k));
  }

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
        for (int r = 0; r < kGroup; r += kLanes / 4)
          dots<kLanes / 4, 4>(weight + int64_t(r) * width, width, x.rows + m,
                              out + m * kOutputs + r);
      if (m + 2 <= x.num_rows) {
        for (int r = 0; r < kGroup; r += kLanes / 2)
          dots<kLanes / 2, 2>(weight + int64_t(r) * width, width, x.rows + m,
                              out + m * kOutputs + r);
        m += 2;
      }
      if (m < x.num_rows)
        for (int r = 0; r < kGroup; r += kLanes)
          dots<kLanes, 1>(weight + int64_t(r) * width, width, x.rows + m, out + m * kOutputs + r);
    }
  }

 private:
  template <int R, int M>
  static void dots(const bf16* weight, int width, const Element* const* x, float* out) {
    F sums[kLanes];
    for (int i = 0; i < kLanes; i++) sums[i] = splat(0.f);
    const Element* rows[M];
    for (int m = 0; m < M; m++) rows[m] = x[m];
    int k = 0;
    for (; k + kLanes <= width; k += kLanes) {
      F inputs[M];
      for (int m = 0; m < M; m++) inputs[m] = load(rows[m] + k);
      for (int r = 0; r < R; r++) {
        const bf16* at = weight + int64_t(r) * width + k;
        const F w = load16(at);
        if (k % 32 == 0) prefetch(at + int64_t(kGroup) * width);
        for (int m = 0; m < M; m++) sums[m * R + r] = fma(w, inputs[m], sums[m * R + r]);
      }
    }
    if (k < width)
      for (int m = 0; m < M; m++)
        for (int r = 0; r < R; r++) {
          const F w = load16(weight + int64_t(r) * width + k, width - k);
          sums[m * R + r] = fma(w, load(rows[m] + k), sums[m * R + r]);
        }
    alignas(64) float all[kLanes];
    store(all, sums_of(sums));
    for (int m = 0; m < M; m++) memcpy(out + m * kOutputs, all + m * R, R * sizeof(float));
  }
};

// Attention in fp32: keys transposed, so that a lane is a key; values widened.
struct FloatsAttention {
  using Query = float;   // [column][dims]
  using Key = float;     // of 16 keys: [dims][16]
  using Value = float;   // [key][dims]
  using Weight = float;  // [column][key]

  static constexpr int kKeyStep = 16;

  static void load_queries(const bf16* const rows[kRows], int columns, int head_dim, Query* to) {
    const int dims = padded(head_dim);
    for (int c = 0; c < columns; c++)
      for (int d = 0; d < dims; d += kLanes)
        store(to + c * dims + d, d < head_dim ? load16(rows[c] + d, head_dim - d) : splat(0.f));
  }

  static void load_keys(const bf16* keys, int head_dim, Key* to) {
    const bf16* rows[kRows];
    for (int i = 0; i < kRows; i++) rows[i] = keys + i * head_dim;
    alignas(64) bf16 paired[kRows * kMaxHeadDim];
    pair_rows(rows, head_dim, paired);
    for (int d = 0; d < padded(head_dim); d += 2)
      for (int i = 0; i < kRows; i += kLanes) {
        Int pair;
        memcpy(&pair, paired + d * kRows + 2 * i, sizeof pair);
        store(to + d * kRows + i, (F)(pair << 16));
        store(to + (d + 1) * kRows + i, (F)(pair & int32_t(0xffff0000)));
      }
  }

  static void load_values(const bf16* values, int count, int head_dim, Value* to, int key) {
    const int dims = padded(head_dim);
    for (int i = 0; i < 16; i++)
      for (int d = 0; d < dims; d += kLanes) {
        const bool there = i < count && d < head_dim;
        store(to + (key + i) * dims + d,
              there ? load16(values + i * head_dim + d, head_dim - d) : splat(0.f));
      }
  }

  static void scores(const Query* queries, int columns, const Key* keys, int num_keys, int head_dim,
                     float (*out)[kKeys]) {
    const int dims = padded(head_dim);
    for (int key = 0; key < num_keys; key += kRows) {
      int c = 0;
      for (; c + 4 <= columns; c += 4)
        scores_of<4>(queries + c * dims, keys + key * dims, dims, key, out + c);
      for (; c < columns; c++)
        scores_of<1>(queries + c * dims, keys + key * dims, dims, key, out + c);
    }
  }

  static void store_weights(Weight* to, F p) { store(to, p); }

  static void add_values(const Weight (*weights)[kKeys], int columns, const Value* values,
                         int num_keys, int dims, float* output) {
    int c = 0;
    for (; c + 4 <= columns; c += 4)
      add_to<4>(weights + c, values, num_keys, dims, output + c * dims);
    for (; c < columns; c++) add_to<1>(weights + c, values, num_keys, dims, output + c * dims);
  }

 private:
  static constexpr int kVectors = kRows / kLanes;  // of 16 keys

  template <int C>
  static void scores_of(const Query* queries, const Key* keys, int dims, int key,
                        float (*out)[kKeys]) {
    F sums[C][kVectors];
    for (int c = 0; c < C; c++)
      for (int i = 0; i < kVectors; i++) sums[c][i] = splat(0.f);
    for (int d = 0; d < dims; d++) {
      F k[kVectors];
      for (int i = 0; i < kVectors; i++) k[i] = load(keys + d * kRows + i * kLanes);
      for (int c = 0; c < C; c++) {
        const F q = splat(queries[c * dims + d]);
        for (int i = 0; i < kVectors; i++) sums[c][i] = fma(k[i], q, sums[c][i]);
      }
    }
    for (int c = 0; c < C; c++)
      for (int i = 0; i < kVectors; i++) store(out[c] + key + i * kLanes, sums[c][i]);
  }

  template <int C>
  static void add_to(const Weight (*weights)[kKeys], const Value* values, int num_keys, int dims,
                     float* output) {
    constexpr int kWidth = C == 1 ? 4 : 2;  // vectors of a column at a time
    for (int d = 0; d < dims; d += kWidth * kLanes) {
      const int width = std::min(kWidth, (dims - d) / kLanes);
      if (width == kWidth)
        add_to<C, kWidth>(weights, values, num_keys, dims, d, output);
      else
        for (int i = 0; i < width; i++)
          add_to<C, 1>(weights, values, num_keys, dims, d + i * kLanes, output);
    }
  }
  template <int C, int D>
  static void add_to(const Weight (*weights)[kKeys], const Value* values, int num_keys, int dims,
                     int d, float* output) {
    F sums[C][D];
    for (int c = 0; c < C; c++)
      for (int i = 0; i < D; i++) sums[c][i] = load(output + c * dims + d + kLanes * i);
    for (int key = 0; key < num_keys; key++) {
      F v[D];
      for (int i = 0; i < D; i++) v[i] = load(values + key * dims + d + kLanes * i);
      for (int c = 0; c < C; c++) {
        const F p = splat(weights[c][key]);
        for (int i = 0; i < D; i++) sums[c][i] = fma(v[i], p, sums[c][i]);
      }
    }
    for (int c = 0; c < C; c++)
      for (int i = 0; i < D; i++) store(output + c * dims + d + kLanes * i, sums[c][i]);
  }
};
