// Weights as they lie in memory, and how an operation is cut into pieces of them.
//
// A matrix is row-major, `width` elements a row, and its format says what an element is. It may be
// some columns of a wider one: then its rows are further apart; of a packed one, whole tiles of each
// strip, or a part of one tile. Pieces are
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
  int32_t stride;  // elements from one row to the next; 0: `width`
  int32_t skipped;  // of packed columns in one tile: those before them
};

// Up to three matrices with the same input, their outputs one after the other.
struct Linear {
  Matrix matrices[3];
  int32_t num_matrices;
  int32_t width;
  int32_t num_outputs;
};

// Up to 16 rows of a matrix, `step` rows apart.
struct Group {
  const Matrix* matrix;
  int64_t row;  // the first
  int count;
  int output;  // the first one's index among the linear's
  int step;

  const bf16* bf16_rows(int width) const {
    return (const bf16*)matrix->weight + row * stride(width);
  }
  int64_t stride(int width) const { return matrix->stride ? matrix->stride : width; }
  const bf16* biases() const { return matrix->bias ? matrix->bias + row : nullptr; }
};

struct Chunk {
  Group groups[2];
  int num_groups;
};

// How a matrix is cut into chunks.
//
// Few rows of activations leave memory as the limit, and a processor that reads 16 places at once is
// given more of it than one that reads a single one: so a group takes one row of each of 16 bands of
// the matrix, and each band is read from its begin to its end. Many rows leave arithmetic as the
// limit: a group is 16 rows beside each other, whose outputs can be stored together.
enum Cut {
  kBands,   // one group, across bands
  kGroups,  // one group of neighbours
  kDoubles  // two
};

inline int num_chunks_of(int64_t rows, Cut cut) {
  const int64_t size = cut == kDoubles ? 2 * kGroup : kGroup;
  return int((rows + size - 1) / size);
}

inline int num_chunks(const Linear& linear, Cut cut) {
  int count = 0;
  for (int i = 0; i < linear.num_matrices; i++)
    count += num_chunks_of(linear.matrices[i].num_rows, cut);
  return count;
}

inline Group neighbours(const Matrix& matrix, int64_t row, int base) {
  const int64_t left = matrix.num_rows - row;
  return {&matrix, row, int(left < kGroup ? left : kGroup), base + int(row), 1};
}

// The group of that number; what bands leave over are neighbours at the matrix's end.
inline Group group_of(const Matrix& matrix, int index, int base, Cut cut) {
  const int bands = int(matrix.num_rows / kGroup);
  if (cut == kBands && index < bands) return {&matrix, index, kGroup, base + index, bands};
  return neighbours(matrix, int64_t(index) * kGroup, base);
}

inline Chunk chunk_of(const Matrix& matrix, int index, int base, Cut cut) {
  Chunk chunk;
  chunk.num_groups = 1;
  if (cut != kDoubles) {
    chunk.groups[0] = group_of(matrix, index, base, cut);
    return chunk;
  }
  const int64_t row = int64_t(index) * 2 * kGroup;
  chunk.groups[0] = neighbours(matrix, row, base);
  if (matrix.num_rows - row > kGroup) {
    chunk.groups[1] = neighbours(matrix, row + kGroup, base);
    chunk.num_groups = 2;
  }
  return chunk;
}

inline Chunk chunk_of(const Linear& linear, int index, Cut cut) {
  int base = 0;
  const Matrix* matrix = linear.matrices;
  for (;; matrix++) {
    const int count = num_chunks_of(matrix->num_rows, cut);
    if (index < count) break;
    index -= count;
    base += int(matrix->num_rows);
  }
  return chunk_of(*matrix, index, base, cut);
}

// Gate and up: rows of the same numbers.
inline int num_gated_chunks(const Linear& linear) {
  return num_chunks_of(linear.matrices[0].num_rows, kGroups);
}

inline Chunk gated_chunk_of(const Matrix matrices[2], int index, Cut cut) {
  Chunk chunk;
  chunk.num_groups = 2;
  for (int i = 0; i < 2; i++) chunk.groups[i] = group_of(matrices[i], index, 0, cut);
  return chunk;
}
