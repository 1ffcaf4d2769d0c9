// Products of row-major bf16 weights, read where they lie, with paired activations.
//
// The weight is the first operand of the AMX tiles: a tile is 16 of its rows by 32 of its columns as
// they lie in memory, and the product comes out transposed, [16 weight rows][16 batch rows].
// Invariant: an output is accumulated in the order of its weight's columns, in one fp32 register,
// whatever else is computed beside it.
#pragma once
#include "simd.h"

constexpr int kTileBytes = 1024;

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
  TileConfig() {
    for (int i = 0; i < 8; i++) row_bytes[i] = 64, rows[i] = 16;
  }
};

// Several matrices [num_rows, width] with the same input, their outputs one after the other.
struct Matrix {
  const bf16* weight;
  const bf16* bias;  // or null
  int64_t num_rows;
};
struct Linear {
  Matrix matrices[3];
  int num_matrices;
  int width;
  int num_outputs;
};

// 16 rows of a weight, or 32 where there are as many; for gate and up, 16 of each.
struct Chunk {
  const bf16* weights[2];
  const bf16* biases[2];  // of the 16 outputs, or null
  int outputs[2];         // the first output's index
  int first[2];           // outputs before this one belong to another chunk
  int num_tiles;
};

inline int num_chunks(const Linear& linear) {
  int count = 0;
  for (int i = 0; i < linear.num_matrices; i++)
    count += int((linear.matrices[i].num_rows + 31) / 32);
  return count;
}

inline Chunk chunk_of(const Linear& linear, int index) {
  int base = 0;
  const Matrix* matrix = linear.matrices;
  for (;; matrix++) {
    const int count = int((matrix->num_rows + 31) / 32);
    if (index < count) break;
    index -= count;
    base += int(matrix->num_rows);
  }
  Chunk chunk;
  chunk.num_tiles = matrix->num_rows - index * 32 > 16 ? 2 : 1;
  for (int i = 0; i < 2; i++) {
    const int wanted = index * 32 + (i < chunk.num_tiles ? i * 16 : 0);
    const int row = wanted + 16 > matrix->num_rows ? int(matrix->num_rows) - 16 : wanted;
    chunk.weights[i] = matrix->weight + int64_t(row) * linear.width;
    chunk.biases[i] = matrix->bias ? matrix->bias + row : nullptr;
    chunk.outputs[i] = base + row;
    chunk.first[i] = wanted - row;
  }
  return chunk;
}

inline int num_gated_chunks(const Linear& linear) { return int(linear.matrices[0].num_rows / 16); }

inline Chunk gated_chunk_of(const Linear& linear, int index) {
  Chunk chunk;
  chunk.num_tiles = 2;
  for (int i = 0; i < 2; i++) {
    chunk.weights[i] = linear.matrices[i].weight + int64_t(index) * 16 * linear.width;
    chunk.biases[i] = linear.matrices[i].bias ? linear.matrices[i].bias + index * 16 : nullptr;
    chunk.outputs[i] = index * 16;
    chunk.first[i] = 0;
  }
  return chunk;
}

inline void prefetch(const char* p) { _mm_prefetch(p, _MM_HINT_T1); }

inline void prefetch_chunk(const Chunk& chunk, int width) {
  for (int i = 0; i < chunk.num_tiles; i++)
    for (int64_t at = 0; at < int64_t(width) * 32; at += 64)
      prefetch((const char*)chunk.weights[i] + at);
}

// The weights of the next chunk, fetched from memory between the products of the present one.
struct Ahead {
  const char* at[2] = {nullptr, nullptr};
  int lines = 0;  // of each of the two tiles' rows, at a step
  int num_steps = 0;

  // `num_products` are left until the chunk is wanted.
  Ahead(const Chunk* next, int width, int num_products) {
    if (!next) return;
    for (int i = 0; i < 2; i++) at[i] = (const char*)next->weights[i];
    lines = num_products < 16 ? 16 / num_products : 1;
    num_steps = width / 2 / lines;
  }
  void fetch() {
    if (--num_steps < 0) return;
    for (int i = 0; i < lines; i++)
      for (int j = 0; j < 2; j++) {
        prefetch(at[j]);
        at[j] += 64;
      }
  }
};

// out[i] = weights[i] x^T for one block of rows.
inline void multiply1(const Chunk& chunk, const bf16* x, int width, Ahead& ahead,
                      float (*out)[2][256]) {
  const char *w0 = (const char*)chunk.weights[0], *w1 = (const char*)chunk.weights[1];
  const char* b = (const char*)x;
  const int64_t stride = int64_t(width) * 2;
  Ahead fetched = ahead;
  _tile_zero(0);
  _tile_zero(1);
  for (int64_t k = 0; k < width / 32; k++) {
    _tile_loadd(6, b + k * kTileBytes, 64);
    _tile_loadd(4, w0 + k * 64, stride);
    _tile_loadd(5, w1 + k * 64, stride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 5, 6);
    fetched.fetch();
  }
  ahead = fetched;
  _tile_stored(0, out[0][0], 64);
  _tile_stored(1, out[0][1], 64);
}

// The same for two blocks.
inline void multiply2(const Chunk& chunk, const bf16* x, int width, Ahead& ahead,
                      float (*out)[2][256]) {
  const char *w0 = (const char*)chunk.weights[0], *w1 = (const char*)chunk.weights[1];
  const char* b = (const char*)x;
  const char* c = b + int64_t(width) * 32;
  const int64_t stride = int64_t(width) * 2;
  Ahead fetched = ahead;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < width / 32; k++) {
    _tile_loadd(6, b + k * kTileBytes, 64);
    _tile_loadd(4, w0 + k * 64, stride);
    _tile_loadd(5, w1 + k * 64, stride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 5, 6);
    _tile_loadd(7, c + k * kTileBytes, 64);
    _tile_dpbf16ps(2, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
    fetched.fetch();
  }
  ahead = fetched;
  _tile_stored(0, out[0][0], 64);
  _tile_stored(1, out[0][1], 64);
  _tile_stored(2, out[1][0], 64);
  _tile_stored(3, out[1][1], 64);
}

inline __m512 bias_of(const bf16* bias, int output) {
  return _mm512_set1_ps(bias ? one(bias[output]) : 0.f);
}

// Into a paired block with `outputs` elements a row.
inline void store_paired(const Chunk& chunk, const float out[2][256], bf16* block) {
  for (int i = 0; i < chunk.num_tiles; i++)
    for (int n = 0; n < 16; n += 2) {
      __m512 low = _mm512_load_ps(out[i] + n * 16), high = _mm512_load_ps(out[i] + n * 16 + 16);
      if (chunk.biases[i]) {
        low = _mm512_add_ps(low, bias_of(chunk.biases[i], n));
        high = _mm512_add_ps(high, bias_of(chunk.biases[i], n + 1));
      }
      _mm512_store_si512(block + (chunk.outputs[i] + n) * kRows, join(low, high));
    }
}

// activation(gate) * up into a paired block.
template <class Activation>
inline void store_gated(const Chunk& chunk, const float out[2][256], bf16* block,
                        Activation activation) {
  for (int n = 0; n < 16; n += 2) {
    __m512 result[2];
    for (int j = 0; j < 2; j++) {
      __m512 gate = _mm512_load_ps(out[0] + (n + j) * 16);
      __m512 up = _mm512_load_ps(out[1] + (n + j) * 16);
      if (chunk.biases[0]) gate = _mm512_add_ps(gate, bias_of(chunk.biases[0], n + j));
      if (chunk.biases[1]) up = _mm512_add_ps(up, bias_of(chunk.biases[1], n + j));
      result[j] = _mm512_mul_ps(rounded(activation(rounded(gate))), rounded(up));
    }
    _mm512_store_si512(block + (chunk.outputs[0] + n) * kRows, join(result[0], result[1]));
  }
}

// Calls row(tile, batch row, 16 outputs) for each of `num_rows` rows.
template <class Row>
inline void by_rows(const Chunk& chunk, const float out[2][256], int num_rows, Row row) {
  for (int i = 0; i < chunk.num_tiles; i++) {
    __m512 bias = _mm512_setzero_ps();
    if (chunk.biases[i]) bias = load16(chunk.biases[i]);
    if (num_rows <= 4) {
      for (int m = 0; m < num_rows; m++)
        row(i, m, _mm512_add_ps(_mm512_i32gather_ps(column_index(), out[i] + m, 4), bias));
    } else {
      __m512i r[16];
      for (int n = 0; n < 16; n++) r[n] = _mm512_load_si512(out[i] + n * 16);
      transpose16(r);
      for (int m = 0; m < num_rows; m++)
        row(i, m, _mm512_add_ps(_mm512_castsi512_ps(r[m]), bias));
    }
  }
}
