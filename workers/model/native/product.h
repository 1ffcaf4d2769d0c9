// What every way of multiplying takes and gives.
#pragma once
#include "matrix.h"

constexpr int kOutputs = 2 * kGroup;  // of a chunk

// Up to 16 rows of activations.
template <class Element>
struct Block {
  const Element* rows[kRows];  // each padded with zeros
  const bf16* paired;          // the same for tiles: [width / 2][16][2]
  int num_rows;
};

// Of a chunk with a block: [row][output].
struct Product {
  alignas(64) float out[kRows][kOutputs];
};

// `count` lanes from x, `step` elements apart.
inline void scatter16(bf16* to, int step, F x, int count) {
  if (step == 1) return store16(to, x, count);
  alignas(64) bf16 part[kLanes];
  store16(part, x);
  for (int i = 0; i < count && i < kLanes; i++) to[int64_t(i) * step] = part[i];
}

// The biases of a group's outputs from the n-th on.
inline F biases_of(const Group& group, int n, int count) {
  const bf16* biases = group.biases();
  if (!biases) return splat(0.f);
  if (group.step == 1) return load16(biases + n, count);
  alignas(64) bf16 part[kLanes] = {};
  for (int i = 0; i < count && i < kLanes; i++) part[i] = biases[int64_t(n + i) * group.step];
  return load16(part);
}

// out(row, first output, step, count, values) for every vector of outputs, biases added.
template <class Out>
inline void each_row(const Chunk& chunk, const Product& product, int num_rows, Out out) {
  for (int g = 0; g < chunk.num_groups; g++) {
    const Group& group = chunk.groups[g];
    for (int n = 0; n < group.count; n += kLanes) {
      const int count = group.count - n;
      const F bias = biases_of(group, n, count);
      for (int m = 0; m < num_rows; m++)
        out(m, group.output + n * group.step, group.step, count,
            load(product.out[m] + g * kGroup + n) + bias);
    }
  }
}
