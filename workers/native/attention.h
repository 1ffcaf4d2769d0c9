// Attention of rows to the keys and values of their own block table, exactly, by online softmax.
//
// A tile is up to 16 columns, a column one query row with one of the heads that share a key head.
// Keys are taken kKeys at a time from multiples of kKeys, and partial results are merged at multiples
// of kPartition. Invariant: a column's arithmetic depends on its own position alone, not on the
// columns beside it: for it, keys out of its sight contribute exact zeros. That makes decoding,
// prefill in any chunks, and a split over threads agree bit for bit.
#pragma once
#include <algorithm>

#include "linear.h"

constexpr int kKeys = 64;
constexpr int kPartition = 512;
constexpr int kTiles = 4;  // of a task: the values that it has interleaved serve all of them
constexpr int kMaxHeadDim = 256;
constexpr float kNothing = -1e30f;  // a maximum over no keys, finite so that differences are too

struct Attention {
  int num_heads, num_kv_heads, head_dim, block_size;
  float scale;    // times log2(e): the softmax is computed in powers of two
  float softcap;  // or 0
  int window;     // keys that a query sees, its own included, or 0 for all
  int64_t layer_offset;  // in a block's bytes
};

// Consecutive rows of the batch with consecutive positions and one block table.
struct Run {
  int row, num_rows, position;
  const int64_t* blocks;
};

// Columns [column, column + num_columns) of a run for one key head; one partition, or all of them.
struct Task {
  int run, kv_head, column, num_columns;
  int partition;  // or -1
  int slot;       // where the partition's result goes
};

// What a task leaves of one partition for the merge. Also the running total of it.
struct Partial {
  float maximum[kRows];
  float sum[kRows];
  float output[kRows * kMaxHeadDim];  // [column][head_dim]
};

struct AttentionScratch {
  alignas(64) bf16 queries[kTiles][kMaxHeadDim * kRows];  // paired, columns for rows
  alignas(64) bf16 values[kKeys * kMaxHeadDim];  // [keys / 32][head_dim / 16][16 pairs][16][2]
  alignas(64) float scores[kKeys][kRows];        // transposed: as the tiles give them
  alignas(64) float by_column[kRows][kKeys];
  alignas(64) bf16 weights[kRows][kKeys];
  alignas(64) float output[kTiles][kRows * kMaxHeadDim];
  alignas(64) float sums[kTiles][kRows][16];  // of 16 lanes each, until the partition ends
  alignas(64) float maximum[kTiles][kRows];
  alignas(64) Partial total[kTiles];
};

inline void merge(Partial& total, const Partial& part, int num_columns, int head_dim) {
  const __m512 m = _mm512_loadu_ps(total.maximum), n = _mm512_loadu_ps(part.maximum);
  const __m512 top = _mm512_max_ps(m, n);
  alignas(64) float a[16], b[16];
  _mm512_store_ps(a, exp2_ps(_mm512_sub_ps(m, top)));
  _mm512_store_ps(b, exp2_ps(_mm512_sub_ps(n, top)));
  _mm512_storeu_ps(total.maximum, top);
  for (int c = 0; c < num_columns; c++) {
    total.sum[c] = total.sum[c] * a[c] + part.sum[c] * b[c];
    float* to = total.output + c * head_dim;
    const float* from = part.output + c * head_dim;
    for (int d = 0; d < head_dim; d += 16)
      _mm512_storeu_ps(
          to + d, _mm512_fmadd_ps(_mm512_loadu_ps(from + d), _mm512_set1_ps(b[c]),
                                  _mm512_mul_ps(_mm512_loadu_ps(to + d), _mm512_set1_ps(a[c]))));
  }
}

inline void clear(Partial& total, int num_columns, int head_dim) {
  for (int c = 0; c < kRows; c++) total.maximum[c] = kNothing, total.sum[c] = 0;
  memset(total.output, 0, sizeof(float) * num_columns * head_dim);
}

// Row-major results: [row][num_heads * head_dim].
inline void finish(const Attention& a, const Run& run, int kv_head, int column, int num_columns,
                   const Partial& total, bf16* out) {
  const int group = a.num_heads / a.num_kv_heads;
  for (int c = 0; c < num_columns; c++) {
    const int row = run.row + (column + c) / group;
    const int head = kv_head * group + (column + c) % group;
    bf16* to = out + (int64_t(row) * a.num_heads + head) * a.head_dim;
    const __m512 sum = _mm512_set1_ps(total.sum[c]);
    for (int d = 0; d < a.head_dim; d += 16)
      store16(to + d, _mm512_div_ps(_mm512_loadu_ps(total.output + c * a.head_dim + d), sum));
  }
}

class AttentionTask {
 public:
  AttentionTask(const Attention& a, const Run& run, const Task& task, AttentionScratch& s)
      : a_(a), run_(run), task_(task), s_(s), group_(a.num_heads / a.num_kv_heads) {}

  // `queries` is row-major, `row_stride` elements a row, the heads first.
  void compute(const bf16* queries, int64_t row_stride, Partial* partials, bf16* out) {
    num_tiles_ = (task_.num_columns + kRows - 1) / kRows;
    for (int t = 0; t < num_tiles_; t++) {
      const bf16* rows[kRows] = {};
      for (int c = 0; c < columns_of(t); c++) {
        const int column = task_.column + t * kRows + c;
        rows[c] = queries + (run_.row + column / group_) * row_stride +
                  (task_.kv_head * group_ + column % group_) * a_.head_dim;
      }
      pair_rows(rows, a_.head_dim, s_.queries[t]);
    }
    const int last = position_of(task_.num_columns - 1);
    int first = 0;
    if (a_.window) first = std::max(0, position_of(0) - a_.window + 1);
    if (task_.partition >= 0) {
      const int begin = std::max(first, task_.partition * kPartition);
      partition(begin, std::min(last + 1, (task_.partition + 1) * kPartition));
      export_partition(0, partials[task_.slot]);
      return;
    }
    for (int t = 0; t < num_tiles_; t++) clear(s_.total[t], columns_of(t), a_.head_dim);
    for (int p = first / kPartition; p <= last / kPartition; p++) {
      partition(std::max(first, p * kPartition), std::min(last + 1, (p + 1) * kPartition));
      for (int t = 0; t < num_tiles_; t++) {
        if (position_of(t * kRows + columns_of(t) - 1) < p * kPartition) continue;
        export_partition(t, part_);
        merge(s_.total[t], part_, columns_of(t), a_.head_dim);
      }
    }
    for (int t = 0; t < num_tiles_; t++)
      finish(a_, run_, task_.kv_head, task_.column + t * kRows, columns_of(t), s_.total[t], out);
  }

 private:
  int columns_of(int tile) const { return std::min(kRows, task_.num_columns - tile * kRows); }
  int position_of(int column) const {
    return run_.position + (task_.column + column) / group_;
  }
  const char* key_at(int position) const {
    const int64_t head_bytes = int64_t(a_.block_size) * a_.head_dim * 2;
    return (const char*)run_.blocks[position / a_.block_size] + a_.layer_offset +
           task_.kv_head * head_bytes + int64_t(position % a_.block_size) * a_.head_dim * 2;
  }
  int64_t value_offset() const {
    return int64_t(a_.num_kv_heads) * a_.block_size * a_.head_dim * 2;
  }

  // Keys [begin, end), within one partition, for all tiles.
  void partition(int begin, int end) {
    for (int t = 0; t < num_tiles_; t++) {
      memset(s_.output[t], 0, sizeof(float) * kRows * a_.head_dim);
      memset(s_.sums[t], 0, sizeof s_.sums[t]);
      for (int c = 0; c < kRows; c++) s_.maximum[t][c] = kNothing;
    }
    for (int start = begin / kKeys * kKeys; start < end; start += kKeys) {
      fetch(start + kKeys, end);
      load_values(start, end);
      for (int t = 0; t < num_tiles_; t++)
        if (position_of(t * kRows + columns_of(t) - 1) >= start) keys(t, start, end);
    }
  }

  void fetch(int start, int end) const {
    const int bytes = 16 * a_.head_dim * 2;
    for (int at = start; at < std::min(end, start + kKeys); at += 16) {
      const char* key = key_at(at);
      for (int i = 0; i < bytes; i += 64) {
        _mm_prefetch(key + i, _MM_HINT_T0);
        _mm_prefetch(key + value_offset() + i, _MM_HINT_T0);
      }
    }
  }

  // Pairs of keys beside each other, as the second operand wants them; zeros from `end` on.
  void load_values(int start, int end) {
    alignas(64) static constexpr uint16_t upper[32] = {
        16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
        24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
    const __m512i high = _mm512_load_si512(upper);
    const __m512i low = _mm512_sub_epi16(high, _mm512_set1_epi16(16));
    const int dims = a_.head_dim;
    for (int at = start; at < start + kKeys && at / 32 * 32 < end; at += 16) {
      const bf16* values = at < end ? (const bf16*)(key_at(at) + value_offset()) : nullptr;
      bf16* to = s_.values + (at - start) / 32 * 32 * dims + (at % 32) / 2 * 32;
      for (int pair = 0; pair < 8; pair++)
        for (int d = 0; d < dims; d += 32) {
          __m512i x = _mm512_setzero_si512(), y = x;
          if (at + 2 * pair < end) x = _mm512_loadu_si512(values + 2 * pair * dims + d);
          if (at + 2 * pair + 1 < end) y = _mm512_loadu_si512(values + (2 * pair + 1) * dims + d);
          bf16* tile = to + d / 16 * 512 + pair * 32;
          _mm512_store_si512(tile, _mm512_permutex2var_epi16(x, low, y));
          _mm512_store_si512(tile + 512, _mm512_permutex2var_epi16(x, high, y));
        }
    }
  }

  // One step of the online softmax of a tile.
  void keys(int t, int start, int end) {
    const int columns = columns_of(t), dims = a_.head_dim;
    for (int i = 0; i < kKeys && start + i < end; i += 16) {
      const char* key = key_at(start + i);
      _tile_zero(0);
      for (int d = 0; d < dims / 32; d++) {
        _tile_loadd(4, key + d * 64, dims * 2);
        _tile_loadd(6, s_.queries[t] + d * 512, 64);
        _tile_dpbf16ps(0, 4, 6);
      }
      _tile_stored(0, s_.scores[i], 64);
    }
    const int num_subtiles = std::min(kKeys, end - start + 15) / 16;
    transpose_scores(columns, num_subtiles);
    alignas(64) float top[16], factor[16];
    const __m512 before = _mm512_load_ps(s_.maximum[t]);
    _mm512_store_ps(top, before);
    for (int c = 0; c < columns; c++) top[c] = std::max(top[c], scale_and_mask(t, c, start));
    const __m512 factors = exp2_ps(_mm512_sub_ps(before, _mm512_load_ps(top)));
    _mm512_store_ps(s_.maximum[t], _mm512_load_ps(top));
    _mm512_store_ps(factor, factors);
    for (int c = 0; c < columns; c++) {
      __m512 sum = _mm512_mul_ps(_mm512_load_ps(s_.sums[t][c]), _mm512_set1_ps(factor[c]));
      const __m512 maximum = _mm512_set1_ps(top[c]);
      for (int i = 0; i < kKeys; i += 16) {
        const __m512 p = exp2_ps(_mm512_sub_ps(_mm512_load_ps(s_.by_column[c] + i), maximum));
        sum = _mm512_add_ps(sum, p);
        store16(s_.weights[c] + i, p);
      }
      _mm512_store_ps(s_.sums[t][c], sum);
    }
    for (int c = 0; c < columns; c++)
      if (factor[c] != 1.f)
        for (int d = 0; d < dims; d += 16) {
          float* o = s_.output[t] + c * dims + d;
          _mm512_store_ps(o, _mm512_mul_ps(_mm512_load_ps(o), _mm512_set1_ps(factor[c])));
        }
    const int num_steps = std::min(kKeys, end - start + 31) / 32;
    for (int d = 0; d < dims / 16; d++) {
      _tile_loadd(0, s_.output[t] + d * 16, dims * 4);
      for (int i = 0; i < num_steps; i++) {
        _tile_loadd(4, s_.weights[0] + i * 32, kKeys * 2);
        _tile_loadd(6, s_.values + i * 32 * dims + d * 512, 64);
        _tile_dpbf16ps(0, 4, 6);
      }
      _tile_stored(0, s_.output[t] + d * 16, dims * 4);
    }
  }

  void transpose_scores(int columns, int num_subtiles) {
    for (int i = 0; i < num_subtiles; i++) {
      const float(*from)[kRows] = s_.scores + i * 16;
      if (columns <= 4) {
        const __m512i lanes = _mm512_mullo_epi32(
            _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
            _mm512_set1_epi32(16));
        for (int c = 0; c < columns; c++)
          _mm512_store_ps(s_.by_column[c] + i * 16, _mm512_i32gather_ps(lanes, from[0] + c, 4));
      } else {
        __m512i r[16];
        for (int k = 0; k < 16; k++) r[k] = _mm512_load_si512(from[k]);
        transpose16(r);
        for (int c = 0; c < columns; c++) _mm512_store_si512(s_.by_column[c] + i * 16, r[c]);
      }
    }
  }

  // The scores of a column in units of the softmax's exponent, -inf where it must not look; their
  // maximum.
  float scale_and_mask(int t, int c, int start) {
    const int position = position_of(t * kRows + c);
    const int oldest = a_.window ? position - a_.window + 1 : 0;
    const bool cut = position < start + kKeys - 1 || oldest > start;
    const __m512 scale = _mm512_set1_ps(a_.scale);
    __m512 most = _mm512_set1_ps(kNothing);
    for (int i = 0; i < kKeys; i += 16) {
      __m512 x = _mm512_mul_ps(_mm512_load_ps(s_.by_column[c] + i), scale);
      if (a_.softcap != 0) {
        const __m512 cap = _mm512_set1_ps(a_.softcap);
        x = _mm512_mul_ps(cap, tanh_ps(_mm512_div_ps(x, cap)));
      }
      if (cut) {
        const __m512i at = _mm512_add_epi32(
            _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
            _mm512_set1_epi32(start + i));
        const __mmask16 seen = _mm512_cmple_epi32_mask(at, _mm512_set1_epi32(position)) &
                               _mm512_cmpge_epi32_mask(at, _mm512_set1_epi32(oldest));
        x = _mm512_mask_blend_ps(seen, _mm512_set1_ps(-INFINITY), x);
      }
      _mm512_store_ps(s_.by_column[c] + i, x);
      most = _mm512_max_ps(most, x);
    }
    return _mm512_reduce_max_ps(most);
  }

  void export_partition(int t, Partial& to) {
    for (int c = 0; c < kRows; c++) {
      to.maximum[c] = s_.maximum[t][c];
      to.sum[c] = _mm512_reduce_add_ps(_mm512_load_ps(s_.sums[t][c]));
    }
    memcpy(to.output, s_.output[t], sizeof(float) * columns_of(t) * a_.head_dim);
  }

  const Attention& a_;
  const Run& run_;
  const Task& task_;
  AttentionScratch& s_;
  const int group_;
  int num_tiles_ = 0;
  Partial part_;
};
