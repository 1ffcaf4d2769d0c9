// Products of bf16 with bf16 on AMX tiles.
//
// The weight is the first operand: a tile is 16 of its rows by 32 of its columns as they lie in
// memory, and the product comes out transposed, [16 weight rows][16 batch rows]. Invariant: an output
// is accumulated in the order of its weight's columns, in one fp32 register, whatever else is
// computed beside it.
#pragma once
#include "attention.h"
#include "paired.h"
#include "product.h"
#if defined(EMULATE_AMX)
#include "emulated_tiles.h"
#endif

constexpr int kTileBytes = 1024;

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
  TileConfig() {
    for (int i = 0; i < 8; i++) row_bytes[i] = 64, rows[i] = 16;
  }
};

struct Tiles {
  // Whether a matrix of this shape can be multiplied so.
  static bool takes(const Matrix& matrix, int width) {
    return matrix.format == kBf16 && width % 32 == 0 && matrix.num_rows >= kGroup;
  }

  // One block, or two at once: the weights are loaded once for both.
  template <int B>
  static void multiply(const Chunk& chunk, int width, const bf16* const paired[B],
                       const int num_rows[B], Product products[B]) {
    const bf16* weights[2];
    for (int g = 0; g < 2; g++) weights[g] = first_row(chunk.groups[g % chunk.num_groups], width);
    alignas(64) float out[B][2][256];
    const int64_t row = chunk.groups[0].stride(width), stride = row * 2;
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (B == 2) {
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t k = 0; k < width / 32; k++) {
      _tile_loadd(6, (const char*)paired[0] + k * kTileBytes, 64);
      _tile_loadd(4, (const char*)weights[0] + k * 64, stride);
      _tile_loadd(5, (const char*)weights[1] + k * 64, stride);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 5, 6);
      if constexpr (B == 2) {
        _tile_loadd(7, (const char*)paired[1] + k * kTileBytes, 64);
        _tile_dpbf16ps(2, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
      }
      if (row == width) fetch_ahead(weights[0], width, k);
    }
    _tile_stored(0, out[0][0], 64);
    _tile_stored(1, out[0][1], 64);
    if constexpr (B == 2) {
      _tile_stored(2, out[1][0], 64);
      _tile_stored(3, out[1][1], 64);
    }
    for (int b = 0; b < B; b++)
      for (int g = 0; g < chunk.num_groups; g++)
        turn(out[b][g], skipped(chunk.groups[g]), chunk.groups[g].count, num_rows[b],
             products[b].out[0] + g * kGroup);
  }

 private:
  // A group at the end of its matrix begins earlier, so that it has 16 rows.
  static int skipped(const Group& group) { return kGroup - group.count; }
  static const bf16* first_row(const Group& group, int width) {
    return group.bf16_rows(width) - skipped(group) * group.stride(width);
  }

  // The next chunk's 32 rows follow this one's: a 32nd of them at each step, twice.
  static void fetch_ahead(const bf16* weights, int width, int64_t k) {
    const char* at = (const char*)(weights + int64_t(2 * kGroup) * width) + k * 2048;
    for (int i = 0; i < 32; i++) prefetch(at + i * 64);
  }

  // [16 outputs][16 rows] → [row][output], without the first `skip` outputs.
  static void turn(const float* from, int skip, int count, int num_rows, float* to) {
    if (num_rows <= 4) {
      const __m512i column = _mm512_slli_epi32((__m512i)lane_index(), 4);
      for (int m = 0; m < num_rows; m++) {
        alignas(64) float row[16];
        _mm512_store_ps(row, _mm512_i32gather_ps(column, from + m, 4));
        memcpy(to + m * kOutputs, row + skip, size_t(count) * 4);
      }
      return;
    }
    Int r[16];
    for (int n = 0; n < 16; n++) memcpy(&r[n], from + n * 16, sizeof r[n]);
    transpose(r);
    for (int m = 0; m < num_rows; m++)
      memcpy(to + m * kOutputs, (const float*)&r[m] + skip, size_t(count) * 4);
  }
};

struct TilesAttention {
  using Query = bf16;   // [column][head_dim]
  using Weight = bf16;  // [column][key]
  struct Arranged {
    alignas(64) bf16 values[kKeys * kMaxHeadDim];  // [key / 32][dims / 16][16 pairs][16][2]
  };
  static constexpr int kKeyStep = 32;
  static constexpr bool kFetches = false;
  static bool reads_sections(int, const SectionFormat&) { return false; }

  static void load_queries(const bf16* const rows[kRows], int columns, int head_dim, Query* to) {
    for (int c = 0; c < columns; c++) memcpy(to + c * head_dim, rows[c], size_t(head_dim) * 2);
  }

  // The values of 32 tokens as a tile has them; zeros where there is no token.
  static void arrange(const Kept& kept, int num_keys, int dims, Arranged& arranged) {
    const int end = (num_keys + 31) / 32 * 32;
    for (int key = 0; key < end; key += 2) {
      const bf16* from = kept.values[key / kSlots] + key % kSlots * dims;
      bf16* to = arranged.values + key / 32 * 32 * dims + key % 32 / 2 * 32;
      for (int d = 0; d < dims; d += 16) {
        const __m512i pairs =
            key < num_keys ? _mm512_loadu_si512(from + 2 * d) : _mm512_setzero_si512();
        _mm512_store_si512(to + d / 16 * 512, pairs);
      }
    }
  }

  static void scores(const Query* queries, int, const Kept& kept, int num_keys, int dims,
                     float (*out)[kKeys]) {
    for (int key = 0; key < num_keys; key += 32) {
      const bf16 *first = kept.keys[key / kSlots], *second = kept.keys[key / kSlots + 1];
      _tile_zero(0);
      _tile_zero(1);
      for (int d = 0; d < dims / 32; d++) {
        _tile_loadd(6, queries + d * 32, dims * 2);
        _tile_loadd(4, first + d * 512, 64);
        _tile_dpbf16ps(0, 6, 4);
        _tile_loadd(5, second + d * 512, 64);
        _tile_dpbf16ps(1, 6, 5);
      }
      _tile_stored(0, out[0] + key, kKeys * 4);
      _tile_stored(1, out[0] + key + 16, kKeys * 4);
    }
  }

  static void store_weights(Weight* to, F p) { store16(to, p); }

  static void add_values(const Weight (*weights)[kKeys], int, const Kept&, const Arranged& arranged,
                         int num_keys, int dims, float* output) {
    _tile_loadd(4, weights[0], kKeys * 2);
    if (num_keys > 32) _tile_loadd(5, weights[0] + 32, kKeys * 2);
    for (int d = 0; d < dims; d += 32) {
      float* o = output + d;
      const bf16* at = arranged.values + d * 32;
      _tile_loadd(0, o, dims * 4);
      _tile_loadd(1, o + 16, dims * 4);
      _tile_loadd(6, at, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, at + 512, 64);
      _tile_dpbf16ps(1, 4, 7);
      if (num_keys > 32) {
        _tile_loadd(6, at + 32 * dims, 64);
        _tile_dpbf16ps(0, 5, 6);
        _tile_loadd(7, at + 32 * dims + 512, 64);
        _tile_dpbf16ps(1, 5, 7);
      }
      _tile_stored(0, o, dims * 4);
      _tile_stored(1, o + 16, dims * 4);
    }
  }
};
