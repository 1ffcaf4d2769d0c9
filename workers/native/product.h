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

// out(group of the chunk, row, first output, count, values) for every vector of outputs, biases added.
template <class Out>
inline void each_row(const Chunk& chunk, const Product& product, int num_rows, Out out) {
  for (int g = 0; g < chunk.num_groups; g++) {
    const Group& group = chunk.groups[g];
    const bf16* biases = group.biases();
    for (int n = 0; n < group.count; n += kLanes) {
      const int count = group.count - n;
      const F bias = biases ? load16(biases + n, count) : splat(0.f);
      for (int m = 0; m < num_rows; m++)
        out(m, group.output + n, count, load(product.out[m] + g * kGroup + n) + bias);
    }
  }
}
