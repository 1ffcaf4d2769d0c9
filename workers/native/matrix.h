// Weights as they lie in memory, and how an operation is cut into pieces of them.
//
// A matrix is row-major, `width` elements a row, and its format says what an element is. Pieces are
// 32 rows, or 16 of each of two matrices whose outputs belong together. Knows nothing of how
// products are made.
#pragma once
#include "rows.h"

enum Format : int32_t { kBf16 = 0 };

constexpr int kGroup = 16;  // weight rows that are multiplied together
constexpr int kRows = 16;   // rows of activations, likewise

struct Matrix {
  const void* weight;
  const bf16* bias;  // or null
  int64_t num_rows;
  int32_t format;
};

// Up to three matrices with the same input, their outputs one after the other.
struct Linear {
  Matrix matrices[3];
  int32_t num_matrices;
  int32_t width;
  int32_t num_outputs;
};

// Up to 16 rows of a matrix.
struct Group {
  const Matrix* matrix;
  int64_t row;  // the first
  int count;
  int output;  // the first one's index among the linear's

  const bf16* bf16_rows(int width) const { return (const bf16*)matrix->weight + row * width; }
  const bf16* biases() const { return matrix->bias ? matrix->bias + row : nullptr; }
};

struct Chunk {
  Group groups[2];
  int num_groups;
};

inline int chunks_of(int64_t rows) { return int((rows + 2 * kGroup - 1) / (2 * kGroup)); }

inline int num_chunks(const Linear& linear) {
  int count = 0;
  for (int i = 0; i < linear.num_matrices; i++) count += chunks_of(linear.matrices[i].num_rows);
  return count;
}

inline Group group_of(const Matrix& matrix, int64_t row, int output) {
  const int64_t left = matrix.num_rows - row;
  return {&matrix, row, int(left < kGroup ? left : kGroup), output};
}

inline Chunk chunk_of(const Linear& linear, int index) {
  int base = 0;
  const Matrix* matrix = linear.matrices;
  for (;; matrix++) {
    const int count = chunks_of(matrix->num_rows);
    if (index < count) break;
    index -= count;
    base += int(matrix->num_rows);
  }
  Chunk chunk;
  const int64_t row = int64_t(index) * 2 * kGroup;
  chunk.groups[0] = group_of(*matrix, row, base + int(row));
  chunk.num_groups = matrix->num_rows - row > kGroup ? 2 : 1;
  if (chunk.num_groups == 2)
    chunk.groups[1] = group_of(*matrix, row + kGroup, base + int(row) + kGroup);
  return chunk;
}

// Gate and up: rows of the same numbers.
inline int num_gated_chunks(const Linear& linear) {
  return int((linear.matrices[0].num_rows + kGroup - 1) / kGroup);
}

inline Chunk gated_chunk_of(const Linear& linear, int index) {
  Chunk chunk;
  chunk.num_groups = 2;
  for (int i = 0; i < 2; i++)
    chunk.groups[i] = group_of(linear.matrices[i], int64_t(index) * kGroup, index * kGroup);
  return chunk;
}
