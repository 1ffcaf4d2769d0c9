// Attention of rows to the keys and values of their own block table, exactly, by online softmax.
//
// A tile is up to 16 columns, a column one query row with one of the heads that share a key head.
// Keys are taken kKeys at a time from multiples of kKeys, and partial results are merged at multiples
// of kPartition. Invariant: a column's arithmetic depends on its own position alone, not on the
// columns beside it: for it, keys out of its sight contribute exact zeros. That makes decoding,
// prefill in any chunks, and a split over threads agree bit for bit.
#pragma once
#include <algorithm>
#include <cmath>

#include "linear.h"

constexpr int kKeys = 64;
constexpr int kPartition = 256;
constexpr int kTiles = 16;  // of a task: keys and values are rearranged once for all of a head's
constexpr int kPairedFrom = 3;  // tiles a head, from which on keys are rearranged instead of scores
constexpr int kMaxHeadDim = 256;
constexpr float kNothing = -1e30f;  // a maximum over no keys, finite so that differences are too
constexpr float kUnseen = -1e35f;   // a score whose weight is zero beside any maximum

struct Attention {
  int num_heads, num_kv_heads, head_dim, block_size;
  float scale;    // times log2(e): the softmax is computed in powers of two
  float softcap;  // likewise, or 0
  int window;     // keys that a query sees, its own included, or 0 for all
  int64_t layer_offset;  // in a block's bytes
};

// Consecutive rows of the batch with consecutive positions and one block table.
struct Run {
  int row, num_rows, position;
  const int64_t* blocks;
};

// Columns [column, column + num_columns) of a run, for each of some key heads; one partition, or all.
struct Task {
  int run, kv_head, num_kv_heads, column, num_columns;
  int partition;  // or -1
  int slot;       // where the partition's results go, head after head
};

// The softmax so far: of each column, the maximum, the sum, and the output [16][head_dim].
// Laid out as floats: maximum [16], sum [16], output.
inline int64_t partial_size(int head_dim) { return 32 + 16 * int64_t(head_dim); }

inline void clear_partial(float* total, int head_dim) {
  memset(total, 0, sizeof(float) * partial_size(head_dim));
  _mm512_store_ps(total, _mm512_set1_ps(kNothing));
}

inline void merge_partial(float* total, const float* maximum, const float* sum,
                          const float* output, int num_columns, int head_dim) {
  const __m512 m = _mm512_load_ps(total), n = _mm512_load_ps(maximum);
  const __m512 top = _mm512_max_ps(m, n);
  const __m512 a = exp2_ps(_mm512_sub_ps(m, top)), b = exp2_ps(_mm512_sub_ps(n, top));
  _mm512_store_ps(total, top);
  _mm512_store_ps(total + 16, _mm512_fmadd_ps(_mm512_load_ps(sum), b,
                                              _mm512_mul_ps(_mm512_load_ps(total + 16), a)));
  alignas(64) float as[16], bs[16];
  _mm512_store_ps(as, a);
  _mm512_store_ps(bs, b);
  for (int c = 0; c < num_columns; c++) {
    const __m512 x = _mm512_set1_ps(as[c]), y = _mm512_set1_ps(bs[c]);
    float* to = total + 32 + c * head_dim;
    const float* from = output + c * head_dim;
    for (int d = 0; d < head_dim; d += 16)
      _mm512_store_ps(to + d, _mm512_fmadd_ps(_mm512_load_ps(from + d), y,
                                              _mm512_mul_ps(_mm512_load_ps(to + d), x)));
  }
}

// Row-major results: [row][num_heads * head_dim].
inline void finish(const Attention& a, const Run& run, int kv_head, int column, int num_columns,
                   const float* total, bf16* out) {
  const int group = a.num_heads / a.num_kv_heads;
  for (int c = 0; c < num_columns; c++) {
    const int row = run.row + (column + c) / group;
    const int head = kv_head * group + (column + c) % group;
    bf16* to = out + (int64_t(row) * a.num_heads + head) * a.head_dim;
    const __m512 sum = _mm512_set1_ps(total[16 + c]);
    for (int d = 0; d < a.head_dim; d += 16)
      store16(to + d, _mm512_div_ps(_mm512_load_ps(total + 32 + c * a.head_dim + d), sum));
  }
}

struct AttentionScratch {
  alignas(64) bf16 queries[kTiles * kRows * kMaxHeadDim];  // a tile: paired, or rows of columns
  alignas(64) bf16 keys[kKeys * kMaxHeadDim];    // paired: [keys / 16][head_dim / 2][16][2]
  alignas(64) bf16 values[kKeys * kMaxHeadDim];  // [keys / 32][head_dim / 16][16 pairs][16][2]
  alignas(64) float by_key[kKeys][kRows];
  alignas(64) float scores[kRows][kKeys];
  alignas(64) bf16 weights[kRows][kKeys];
  alignas(64) float highest[kRows][16];
  alignas(64) float output[kTiles * kRows * kMaxHeadDim];
  alignas(64) float sums[kTiles][kRows][16];  // of 16 lanes each, until the partition ends
  alignas(64) float maximum[kTiles][kRows];
  alignas(64) float total[kTiles * (32 + kRows * kMaxHeadDim)];
};

class AttentionTask {
 public:
  AttentionTask(const Attention& a, const Run& run, const Task& task, AttentionScratch& s)
      : a_(a),
        run_(run),
        task_(task),
        s_(s),
        group_(a.num_heads / a.num_kv_heads),
        head_tiles_((task.num_columns + kRows - 1) / kRows),
        num_tiles_(head_tiles_ * task.num_kv_heads),
        pairs_keys_(head_tiles_ >= kPairedFrom) {}

  // `queries` is row-major, `row_stride` elements a row, the heads first. A partition's result goes
  // to `partials`, the whole one's to `out`.
  void compute(const bf16* queries, int64_t row_stride, float* partials, bf16* out) {
    for (int t = 0; t < num_tiles_; t++) load_queries(t, queries, row_stride);
    const int last = position_of(task_.num_columns - 1);
    int first = 0;
    if (a_.window) first = std::max(0, position_of(0) - a_.window + 1);
    if (task_.partition >= 0) {
      const int begin = task_.partition * kPartition;
      partition(std::max(first, begin), std::min(last + 1, begin + kPartition));
      for (int t = 0; t < num_tiles_; t++) {
        float* to = partials + (task_.slot + t) * partial_size(a_.head_dim);
        clear_partial(to, a_.head_dim);
        merge(t, to);
      }
      return;
    }
    for (int t = 0; t < num_tiles_; t++) clear_partial(total_of(t), a_.head_dim);
    for (int p = first / kPartition; p <= last / kPartition; p++) {
      partition(std::max(first, p * kPartition), std::min(last + 1, (p + 1) * kPartition));
      for (int t = 0; t < num_tiles_; t++)
        if (last_position(t) >= p * kPartition) merge(t, total_of(t));
    }
    for (int t = 0; t < num_tiles_; t++)
      finish(a_, run_, head_of(t), task_.column + t % head_tiles_ * kRows, columns_of(t),
             total_of(t), out);
  }

 private:
  int head_of(int tile) const { return task_.kv_head + tile / head_tiles_; }
  int columns_of(int tile) const {
    return std::min(kRows, task_.num_columns - tile % head_tiles_ * kRows);
  }
  int position_of(int column) const {
    return run_.position + (task_.column + column) / group_;
  }
  int last_position(int tile) const {
    return position_of(tile % head_tiles_ * kRows + columns_of(tile) - 1);
  }
  bf16* queries_of(int tile) const { return s_.queries + tile * kRows * a_.head_dim; }
  float* output_of(int tile) const { return s_.output + tile * kRows * a_.head_dim; }
  float* total_of(int tile) const { return s_.total + tile * partial_size(a_.head_dim); }
  int64_t head_bytes() const { return int64_t(a_.block_size) * a_.head_dim * 2; }
  const char* key_at(int position, int kv_head) const {
    return (const char*)run_.blocks[position / a_.block_size] + a_.layer_offset +
           kv_head * head_bytes() + int64_t(position % a_.block_size) * a_.head_dim * 2;
  }

  void load_queries(int t, const bf16* queries, int64_t row_stride) {
    const bf16* rows[kRows] = {};
    for (int c = 0; c < columns_of(t); c++) {
      const int column = task_.column + t % head_tiles_ * kRows + c;
      rows[c] = queries + (run_.row + column / group_) * row_stride +
                (head_of(t) * group_ + column % group_) * a_.head_dim;
    }
    if (!pairs_keys_) return pair_rows(rows, a_.head_dim, queries_of(t));
    for (int c = 0; c < columns_of(t); c++)
      memcpy(queries_of(t) + c * a_.head_dim, rows[c], a_.head_dim * 2);
  }

  // Keys [begin, end), within one partition, for all tiles.
  void partition(int begin, int end) {
    for (int t = 0; t < num_tiles_; t++) {
      memset(output_of(t), 0, sizeof(float) * kRows * a_.head_dim);
      memset(s_.sums[t], 0, sizeof s_.sums[t]);
      _mm512_store_ps(s_.maximum[t], _mm512_set1_ps(kNothing));
    }
    for (int start = begin / kKeys * kKeys; start < end; start += kKeys) {
      fetch(start + kKeys);
      for (int head = 0; head < task_.num_kv_heads; head++) {
        load_values(start, end, task_.kv_head + head);
        if (pairs_keys_) pair_keys(start, end, task_.kv_head + head);
        for (int t = head * head_tiles_; t < (head + 1) * head_tiles_; t++)
          if (last_position(t) >= start) step(t, start, end);
      }
    }
  }

  // The heads of a block lie one after the other.
  void fetch(int start) const {
    const int64_t bytes = std::min<int64_t>(16, a_.block_size) * a_.head_dim * 2;
    const int end = std::min(position_of(task_.num_columns - 1) + 1, start + kKeys);
    for (int at = start; at < end; at += 16)
      for (int head = 0; head < task_.num_kv_heads; head++) {
        const char* key = key_at(at, task_.kv_head + head);
        const char* value = key + a_.num_kv_heads * head_bytes();
        for (int64_t i = 0; i < bytes; i += 64) {
          _mm_prefetch(key + i, _MM_HINT_T0);
          _mm_prefetch(value + i, _MM_HINT_T0);
        }
      }
  }

  // Pairs of keys beside each other, as the second operand wants them; zeros from `end` on.
  void load_values(int start, int end, int kv_head) {
    alignas(64) static constexpr uint16_t upper[32] = {
        16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
        24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
    const __m512i high = _mm512_load_si512(upper);
    const __m512i low = _mm512_sub_epi16(high, _mm512_set1_epi16(16));
    const int dims = a_.head_dim;
    for (int at = start; at < start + kKeys && at / 32 * 32 < end; at += 16) {
      const bf16* values = nullptr;
      if (at < end)
        values = (const bf16*)(key_at(at, kv_head) + a_.num_kv_heads * head_bytes());
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

  void pair_keys(int start, int end, int kv_head) {
    for (int at = start; at < std::min(end, start + kKeys); at += 16) {
      const bf16* rows[kRows];
      for (int i = 0; i < kRows; i++)
        rows[i] = (const bf16*)key_at(at, kv_head) + i * a_.head_dim;
      pair_rows(rows, a_.head_dim, s_.keys + (at - start) * a_.head_dim);
    }
  }

  // One step of the online softmax of a tile.
  void step(int t, int start, int end) {
    const int columns = columns_of(t), dims = a_.head_dim;
    if (pairs_keys_)
      scores_of_paired_keys(t);
    else
      scores_of_keys(t, start, std::min(kKeys, end - start + 15) / 16);
    for (int c = 0; c < columns; c++) mask_and_maximize(t, c, start);
    const __m512 before = _mm512_load_ps(s_.maximum[t]);
    const __m512 now = _mm512_max_ps(before, highest_of(columns));
    _mm512_store_ps(s_.maximum[t], now);
    alignas(64) float top[16], factor[16];
    _mm512_store_ps(top, now);
    _mm512_store_ps(factor, exp2_ps(_mm512_sub_ps(before, now)));
    const __m512 scale = _mm512_set1_ps(a_.softcap != 0 ? 1.f : a_.scale);
    for (int c = 0; c < columns; c++) {
      const __m512 maximum = _mm512_set1_ps(top[c]);
      const float* scores = s_.scores[c];
      __m512 p[kKeys / 16];
      for (int i = 0; i < kKeys / 16; i++)
        p[i] = exp2_ps(_mm512_fmsub_ps(_mm512_load_ps(scores + i * 16), scale, maximum));
      for (int i = 0; i < kKeys / 16; i += 2)
        _mm512_store_si512(s_.weights[c] + i * 16, (__m512i)_mm512_cvtne2ps_pbh(p[i + 1], p[i]));
      const __m512 sum = _mm512_add_ps(_mm512_add_ps(p[0], p[1]), _mm512_add_ps(p[2], p[3]));
      _mm512_store_ps(s_.sums[t][c],
                      _mm512_fmadd_ps(_mm512_load_ps(s_.sums[t][c]), _mm512_set1_ps(factor[c]),
                                      sum));
    }
    for (uint32_t changed = _mm512_cmpneq_ps_mask(before, now); changed; changed &= changed - 1) {
      const int c = __builtin_ctz(changed);
      if (c >= columns) break;
      const __m512 by = _mm512_set1_ps(factor[c]);
      float* o = output_of(t) + c * dims;
      for (int d = 0; d < dims; d += 16)
        _mm512_store_ps(o + d, _mm512_mul_ps(_mm512_load_ps(o + d), by));
    }
    add_values(t, std::min(kKeys, end - start + 31) / 32);
  }

  // Keys as the first operand, as they lie: the scores come out transposed.
  void scores_of_keys(int t, int start, int num_subtiles) {
    const int dims = a_.head_dim;
    const char* keys[4];
    for (int i = 0; i < 4; i++)
      keys[i] = key_at(start + 16 * std::min(i, num_subtiles - 1), head_of(t));
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int d = 0; d < dims / 32; d++) {
      _tile_loadd(6, queries_of(t) + d * 512, 64);
      _tile_loadd(4, keys[0] + d * 64, dims * 2);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(5, keys[1] + d * 64, dims * 2);
      _tile_dpbf16ps(1, 5, 6);
      _tile_loadd(4, keys[2] + d * 64, dims * 2);
      _tile_dpbf16ps(2, 4, 6);
      _tile_loadd(5, keys[3] + d * 64, dims * 2);
      _tile_dpbf16ps(3, 5, 6);
    }
    _tile_stored(0, s_.by_key[0], 64);
    _tile_stored(1, s_.by_key[16], 64);
    _tile_stored(2, s_.by_key[32], 64);
    _tile_stored(3, s_.by_key[48], 64);
    const int columns = columns_of(t);
    for (int i = 0; i < num_subtiles; i++) {
      const float(*from)[kRows] = s_.by_key + i * 16;
      if (columns <= 4) {
        for (int c = 0; c < columns; c++)
          _mm512_store_ps(s_.scores[c] + i * 16,
                          _mm512_i32gather_ps(column_index(), from[0] + c, 4));
      } else {
        __m512i r[16];
        for (int k = 0; k < 16; k++) r[k] = _mm512_load_si512(from[k]);
        transpose16(r);
        for (int c = 0; c < columns; c++) _mm512_store_si512(s_.scores[c] + i * 16, r[c]);
      }
    }
  }

  void scores_of_paired_keys(int t) {
    const int dims = a_.head_dim;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int d = 0; d < dims / 32; d++) {
      const bf16* keys = s_.keys + d * 512;
      _tile_loadd(6, queries_of(t) + d * 32, dims * 2);
      _tile_loadd(4, keys, 64);
      _tile_dpbf16ps(0, 6, 4);
      _tile_loadd(5, keys + 16 * dims, 64);
      _tile_dpbf16ps(1, 6, 5);
      _tile_loadd(4, keys + 32 * dims, 64);
      _tile_dpbf16ps(2, 6, 4);
      _tile_loadd(5, keys + 48 * dims, 64);
      _tile_dpbf16ps(3, 6, 5);
    }
    _tile_stored(0, s_.scores[0], kKeys * 4);
    _tile_stored(1, s_.scores[0] + 16, kKeys * 4);
    _tile_stored(2, s_.scores[0] + 32, kKeys * 4);
    _tile_stored(3, s_.scores[0] + 48, kKeys * 4);
  }

  // What the column must not see gets a score far below all others; the highest of each lane goes to
  // s_.highest. With a soft cap the scores are in units of the softmax's exponent from here on.
  void mask_and_maximize(int t, int c, int start) {
    const int position = position_of(t % head_tiles_ * kRows + c);
    const int oldest = a_.window ? position - a_.window + 1 : 0;
    float* scores = s_.scores[c];
    if (a_.softcap != 0) {
      const __m512 cap = _mm512_set1_ps(a_.softcap), scale = _mm512_set1_ps(a_.scale);
      for (int i = 0; i < kKeys; i += 16) {
        const __m512 x = _mm512_mul_ps(_mm512_load_ps(scores + i), scale);
        _mm512_store_ps(scores + i, _mm512_mul_ps(cap, tanh_ps(_mm512_div_ps(x, cap))));
      }
    }
    if (position < start + kKeys - 1 || oldest > start)
      for (int i = 0; i < kKeys; i += 16) {
        const __m512i at = _mm512_add_epi32(lane_index(), _mm512_set1_epi32(start + i));
        const __mmask16 seen = _mm512_cmple_epi32_mask(at, _mm512_set1_epi32(position)) &
                               _mm512_cmpge_epi32_mask(at, _mm512_set1_epi32(oldest));
        _mm512_mask_store_ps(scores + i, ~seen, _mm512_set1_ps(kUnseen));
      }
    _mm512_store_ps(s_.highest[c],
                    _mm512_max_ps(_mm512_max_ps(_mm512_load_ps(scores), _mm512_load_ps(scores + 16)),
                                  _mm512_max_ps(_mm512_load_ps(scores + 32),
                                                _mm512_load_ps(scores + 48))));
  }

  // Each column's highest score in units of the softmax's exponent.
  __m512 highest_of(int columns) {
    __m512 most;
    if (columns <= 4) {
      alignas(64) float by_column[16] = {};
      for (int c = 0; c < columns; c++)
        by_column[c] = _mm512_reduce_max_ps(_mm512_load_ps(s_.highest[c]));
      most = _mm512_load_ps(by_column);
    } else {
      __m512i r[16];
      for (int c = 0; c < 16; c++) r[c] = _mm512_load_si512(s_.highest[c]);
      transpose16(r);
      for (int step = 8; step; step /= 2)
        for (int i = 0; i < step; i++)
          r[i] = (__m512i)_mm512_max_ps((__m512)r[i], (__m512)r[i + step]);
      most = (__m512)r[0];
    }
    if (a_.softcap == 0) most = _mm512_mul_ps(most, _mm512_set1_ps(a_.scale));
    return _mm512_mask_blend_ps(__mmask16((1u << columns) - 1), _mm512_set1_ps(kNothing), most);
  }

  // output += weights * values
  void add_values(int t, int num_steps) {
    const int dims = a_.head_dim;
    _tile_loadd(4, s_.weights[0], kKeys * 2);
    if (num_steps > 1) _tile_loadd(5, s_.weights[0] + 32, kKeys * 2);
    for (int d = 0; d < dims; d += 32) {
      float* o = output_of(t) + d;
      const bf16* values = s_.values + d * 32;
      _tile_loadd(0, o, dims * 4);
      _tile_loadd(1, o + 16, dims * 4);
      _tile_loadd(6, values, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, values + 512, 64);
      _tile_dpbf16ps(1, 4, 7);
      if (num_steps > 1) {
        _tile_loadd(6, values + 32 * dims, 64);
        _tile_dpbf16ps(0, 5, 6);
        _tile_loadd(7, values + 32 * dims + 512, 64);
        _tile_dpbf16ps(1, 5, 7);
      }
      _tile_stored(0, o, dims * 4);
      _tile_stored(1, o + 16, dims * 4);
    }
  }

  // Add a finished partition to `total`.
  void merge(int t, float* total) {
    alignas(64) float sums[16] = {};
    for (int c = 0; c < columns_of(t); c++)
      sums[c] = _mm512_reduce_add_ps(_mm512_load_ps(s_.sums[t][c]));
    merge_partial(total, s_.maximum[t], sums, output_of(t), columns_of(t), a_.head_dim);
  }

  const Attention& a_;
  const Run& run_;
  const Task& task_;
  AttentionScratch& s_;
  const int group_, head_tiles_, num_tiles_;
  const bool pairs_keys_;
};
