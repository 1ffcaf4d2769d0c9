// Attention of rows to the keys and values of their own block table, exactly, by online softmax.
//
// A tile is up to 16 columns, a column one query row with one of the heads that share a key head.
// Keys are taken kKeys at a time from multiples of kKeys, and partial results are merged at multiples
// of kPartition. Invariant: a column's arithmetic depends on its own position alone, not on the
// columns beside it: for it, keys out of its sight contribute exact zeros. That makes decoding,
// prefill in any chunks, and a split over threads agree bit for bit.
//
// In a block, each head's keys lie 16 tokens together, [head_dim / 2][16][2], so that a vector holds
// a pair of elements of 16 keys; its values lie [token / 2][head_dim][2], so that one holds a pair of
// tokens. The half of a pair whose token has not come yet is zero.
//
// Where keys and values are quantized, a column sees its own section (sections.h) as bf16 and all
// before it as they were rounded, also those that are completed in the same call.
//
// How scores and weighted sums are made is up to a policy, one for each way of multiplying:
//   Query, Weight   the elements of its copies of queries and softmax weights
//   load_queries(...), scores(...), store_weights(...), add_values(...)
//   kKeyStep   the number of keys that scores are made of is a multiple of this
//   kFetches   its products fetch the next keys and values while they read these; others' are fetched
//              before
#pragma once
#include <algorithm>
#include <climits>

#include "matrix.h"
#include "sections.h"

constexpr int kKeys = 64;
constexpr int kPartition = 256;
constexpr int kTiles = 16;  // of a task: keys and values are rearranged once for all of a head's
constexpr int kMaxHeadDim = 256;
constexpr float kNothing = -1e30f;  // a maximum over no keys, finite so that differences are too
constexpr float kUnseen = -1e35f;   // a score whose weight is zero beside any maximum

struct Attention {
  int32_t num_heads, num_kv_heads, head_dim, block_size;
  float scale;    // times log2(e): the softmax is computed in powers of two
  float softcap;  // likewise, or 0
  int32_t window;  // keys that a query sees, its own included, or 0 for all
  int32_t sees_all;  // a query sees the keys of all rows of its run, and none is of another
  int64_t layer_offset;  // in a block's bytes
  int64_t open_offset;   // likewise, of an open section's block number open_block
  int32_t open_block;
  int32_t kept_bits;  // of keys and values: 8 or 4, or 0 for bf16
  // Where in a row of projections a head's part begins, and how far the next head's is.
  int32_t query, query_step, key, key_step, value, value_step;
};

// Bytes of a section of all heads as bf16.
inline int64_t open_bytes(const Attention& a) {
  return int64_t(2) * kSection * a.num_kv_heads * a.head_dim * sizeof(bf16);
}

// Consecutive rows of the batch with consecutive positions and one block table.
struct Run {
  int row, num_rows, position;
  const int64_t* blocks;
  const int64_t* open;  // [2][num_open]: blocks of the first row's section, of the last one's
  int num_open;
  int fresh;  // where the call keeps, for a layer, the sections that begin and end in this run

  int last_seen(const Attention& a, int at) const { return a.sees_all ? num_rows - 1 : at; }
  int last_section() const { return (position + num_rows - 1) / kSection; }
  int first_fresh() const { return (position + kSection - 1) / kSection; }
  int num_fresh() const { return std::max(0, last_section() - first_fresh()); }

  // A section of this call's as bf16: keys, then values, as in a block of as many tokens.
  bf16* open_section(const Attention& a, bf16* all_fresh, int section) const {
    if (section == last_section())
      return (bf16*)(open[num_open + a.open_block] + a.open_offset);
    if (section < first_fresh()) return (bf16*)(open[a.open_block] + a.open_offset);
    return (bf16*)((char*)all_fresh + (fresh + section - first_fresh()) * open_bytes(a));
  }
  Section section(const Attention& a, int section, int kv_head) const {
    const SectionFormat format{a.kept_bits, a.head_dim};
    const int at = section * kSection, within = at % a.block_size / kSection;
    const int64_t block = blocks[at / a.block_size] + a.layer_offset;
    return {format, (uint8_t*)block + (within * a.num_kv_heads + kv_head) * format.bytes()};
  }
};

// Columns [column, column + num_columns) of a run, for each of some key heads; one partition, or all.
struct Task {
  int run, kv_head, num_kv_heads, column, num_columns;
  int partition;  // or -1
  int slot;       // where the partition's results go, head after head
};

// The softmax so far, as floats: of each column the maximum [16], the sum [16], the output [16][dims].
inline int64_t partial_size(int head_dim) { return 32 + 16 * int64_t(padded(head_dim)); }

inline void clear_partial(float* total, int num_columns, int head_dim) {
  memset(total, 0, sizeof(float) * size_t(32 + num_columns * padded(head_dim)));
  for (int c = 0; c < 16; c++) total[c] = kNothing;
}

inline void merge_partial(float* total, const float* maxima, const float* sums, const float* output,
                          int num_columns, int dims) {
  alignas(64) float as[16], bs[16];
  for (int c = 0; c < 16; c += kLanes) {
    const F m = load(total + c), n = load(maxima + c), top = maximum(m, n);
    const F a = exp2_of(m - top), b = exp2_of(n - top);
    store(total + c, top);
    store(total + 16 + c, fma(load(sums + c), b, load(total + 16 + c) * a));
    store(as + c, a);
    store(bs + c, b);
  }
  for (int c = 0; c < num_columns; c++) {
    const F x = splat(as[c]), y = splat(bs[c]);
    float* to = total + 32 + c * dims;
    const float* from = output + c * dims;
    for (int d = 0; d < dims; d += kLanes) store(to + d, fma(load(from + d), y, load(to + d) * x));
  }
}

// Results [row][num_heads * head_dim], `stride` elements a row.
inline void finish(const Attention& a, const Run& run, int kv_head, int column, int num_columns,
                   const float* total, bf16* out, int64_t stride) {
  const int group = a.num_heads / a.num_kv_heads, dims = padded(a.head_dim);
  for (int c = 0; c < num_columns; c++) {
    const int64_t row = run.row + (column + c) / group;
    const int head = kv_head * group + (column + c) % group;
    bf16* to = out + row * stride + int64_t(head) * a.head_dim;
    const F sum = splat(total[16 + c]);
    for (int d = 0; d < a.head_dim; d += kLanes)
      store16(to + d, load(total + 32 + c * dims + d) / sum, a.head_dim - d);
  }
}

// Where the keys and values of kKeys tokens are: of each kSlots of them, the first's.
struct Kept {
  const bf16* keys[kKeys / kSlots];
  const bf16* values[kKeys / kSlots];
  // What a policy that fetches is to have come meanwhile, if `fetches`: as much, of the keys after them.
  const bf16* next_keys[kKeys / kSlots];
  const bf16* next_values[kKeys / kSlots];
  bool fetches = false;
  const float* key_scales = nullptr;  // what a token's key and value are times; null: 1
  const float* value_scales = nullptr;
  // Two sections in the place of all that, where the policy reads them: of so many bits, with what
  // all of their scales are.
  int bits = 0;
  const uint8_t *sections[2], *next_sections[2];
  const float* scales[2];
};

inline void keep_key(bf16* keys, int slot, int head_dim, const bf16* key) {
  bf16* to = keys + int64_t(slot / kSlots) * kSlots * head_dim + 2 * (slot % kSlots);
  for (int d = 0; d < head_dim; d += 2) memcpy(to + d * kSlots, key + d, 4);
}
// With `ends`, no token comes with the next one's value in this call.
inline void keep_value(bf16* values, int slot, int head_dim, const bf16* value, bool ends) {
  bf16* to = values + int64_t(slot / 2) * 2 * head_dim + slot % 2;
  for (int d = 0; d < head_dim; d++) to[2 * d] = value[d];
  if (ends && slot % 2 == 0)
    for (int d = 0; d < head_dim; d++) to[2 * d + 1] = 0;
}

// Two sections of a head as bf16, and their scales; and scales of keys the last of which are 1.
struct Widened {
  alignas(64) bf16 keys[kKeys * kMaxHeadDim + 64];
  alignas(64) bf16 values[kKeys * kMaxHeadDim + 64];
  alignas(64) float key_scales[kKeys], value_scales[kKeys];
  alignas(64) float own_key_scales[kKeys], own_value_scales[kKeys];
  alignas(64) float scales[2][4 * kMaxHeadDim];  // of each section, as they lie there
};

template <class Policy>
struct AttentionScratch {
  Widened* widened;  // where there are sections
  bf16* fresh;
  alignas(64) typename Policy::Query queries[kTiles * kRows * kMaxHeadDim];
  alignas(64) typename Policy::Arranged arranged;
  alignas(64) float scores[kRows][kKeys];
  alignas(64) typename Policy::Weight weights[kRows][kKeys];
  alignas(64) float output[kTiles * kRows * kMaxHeadDim];
  alignas(64) float sums[kTiles][kRows][kLanes];  // of each lane, until the partition ends
  alignas(64) float maxima[kTiles][kRows];
  alignas(64) float total[kTiles * (32 + kRows * kMaxHeadDim)];
};

template <class Policy>
class AttentionTask {
 public:
  AttentionTask(const Attention& a, const Run& run, const Task& task, AttentionScratch<Policy>& s)
      : a_(a),
        run_(run),
        task_(task),
        s_(s),
        group_(a.num_heads / a.num_kv_heads),
        dims_(padded(a.head_dim)),
        head_tiles_((task.num_columns + kRows - 1) / kRows),
        num_tiles_(head_tiles_ * task.num_kv_heads),
        section_bytes_(SectionFormat{a.kept_bits, a.head_dim}.bytes()) {}

  // Have the first keys and values come.
  void fetch_first() const {
    fetch(a_.window ? std::max(0, position_of(0) - a_.window + 1) / kKeys * kKeys
                    : std::max(0, task_.partition) * kPartition);
  }

  // `queries` are rows of projections, `row_stride` elements each. A partition's result goes to
  // `partials`, the whole one's to `out`, `out_stride` elements a row.
  void compute(const bf16* queries, int64_t row_stride, float* partials, bf16* out,
               int64_t out_stride) {
    for (int t = 0; t < num_tiles_; t++) load_queries(t, queries, row_stride);
    const int last = last_seen(task_.num_columns - 1);
    int first = 0;
    if (a_.window) first = std::max(0, position_of(0) - a_.window + 1);
    if (task_.partition >= 0) {
      const int begin = task_.partition * kPartition;
      partition(std::max(first, begin), std::min(last + 1, begin + kPartition));
      for (int t = 0; t < num_tiles_; t++) {
        float* to = partials + (task_.slot + t) * partial_size(a_.head_dim);
        clear_partial(to, columns_of(t), a_.head_dim);
        merge(t, to);
      }
      return;
    }
    for (int t = 0; t < num_tiles_; t++) clear_partial(total_of(t), columns_of(t), a_.head_dim);
    for (int p = first / kPartition; p <= last / kPartition; p++) {
      partition(std::max(first, p * kPartition), std::min(last + 1, (p + 1) * kPartition));
      for (int t = 0; t < num_tiles_; t++)
        if (last_seen_by(t) >= p * kPartition) merge(t, total_of(t));
    }
    for (int t = 0; t < num_tiles_; t++)
      finish(a_, run_, head_of(t), task_.column + t % head_tiles_ * kRows, columns_of(t),
             total_of(t), out, out_stride);
  }

 private:
  int head_of(int tile) const { return task_.kv_head + tile / head_tiles_; }
  int columns_of(int tile) const {
    return std::min(kRows, task_.num_columns - tile % head_tiles_ * kRows);
  }
  int position_of(int column) const { return run_.position + (task_.column + column) / group_; }
  // The furthest key that a column sees, or any of a tile's.
  int last_seen(int column) const { return run_.last_seen(a_, position_of(column)); }
  int last_seen_by(int tile) const {
    return last_seen(tile % head_tiles_ * kRows + columns_of(tile) - 1);
  }
  auto* queries_of(int tile) const { return s_.queries + tile * kRows * dims_; }
  float* output_of(int tile) const { return s_.output + tile * kRows * dims_; }
  float* total_of(int tile) const { return s_.total + tile * partial_size(a_.head_dim); }
  SectionFormat format() const { return {a_.kept_bits, a_.head_dim}; }
  int64_t head_bytes() const { return int64_t(a_.block_size) * a_.head_dim * 2; }
  // The block of the token at `position`, of that head, and where its tokens are within it.
  const bf16* keys_at(int position, int kv_head) const {
    const int within = position % a_.block_size / kSlots * kSlots;
    return (const bf16*)((const char*)run_.blocks[position / a_.block_size] + a_.layer_offset +
                         kv_head * head_bytes()) +
           int64_t(within) * a_.head_dim;
  }
  const bf16* values_at(int position, int kv_head) const {
    return keys_at(position, kv_head) + a_.num_kv_heads * head_bytes() / 2;
  }

  void load_queries(int t, const bf16* queries, int64_t row_stride) {
    const bf16* rows[kRows] = {};
    for (int c = 0; c < columns_of(t); c++) {
      const int column = task_.column + t % head_tiles_ * kRows + c;
      rows[c] = queries + (run_.row + column / group_) * row_stride + a_.query +
                (head_of(t) * group_ + column % group_) * a_.query_step;
    }
    Policy::load_queries(rows, columns_of(t), a_.head_dim, queries_of(t));
  }

  // Keys [begin, end), within one partition, for all tiles.
  void partition(int begin, int end) {
    for (int t = 0; t < num_tiles_; t++) {
      memset(output_of(t), 0, sizeof(float) * size_t(columns_of(t) * dims_));
      memset(s_.sums[t], 0, sizeof(float) * size_t(columns_of(t) * kLanes));
      for (int c = 0; c < kRows; c++) s_.maxima[t][c] = kNothing;
    }
    const int last = last_seen(task_.num_columns - 1);
    for (int start = begin / kKeys * kKeys; start < end; start += kKeys) {
      if (a_.kept_bits)
        find_sections(start);
      else if (!Policy::kFetches)
        fetch(start + kKeys);
      const int stop = std::min(end, start + kKeys);
      for (int head = 0; head < task_.num_kv_heads; head++) {
        if (a_.kept_bits) {
          step_by_sections(head, start, stop);
          continue;
        }
        const int kv_head = task_.kv_head + head;
        Kept kept;
        kept.fetches = Policy::kFetches && start + kKeys <= last;
        for (int i = 0; i < kKeys / kSlots; i++) {
          const int at = std::min(start + i * kSlots, stop - 1);
          kept.keys[i] = keys_at(at, kv_head);
          kept.values[i] = values_at(at, kv_head);
          const int next = std::min(start + kKeys + i * kSlots, last);
          kept.next_keys[i] = keys_at(next, kv_head);
          kept.next_values[i] = values_at(next, kv_head);
        }
        Policy::arrange(kept, stop - start, a_.head_dim, s_.arranged);
        for (int t = head * head_tiles_; t < (head + 1) * head_tiles_; t++)
          if (last_seen_by(t) >= start) {
            step(t, start, stop, kept, 0, INT_MAX);
            kept.fetches = false;
          }
      }
    }
  }

  // Where the first of the task's heads has the sections from `start` on that are rounded.
  void find_sections(int start) {
    const int last = position_of(task_.num_columns - 1) / kSection;
    for (int i = 0; i < 4; i++) {
      const int section = start / kSection + i;
      sections_[i] = section < last ? run_.section(a_, section, task_.kv_head).at : nullptr;
    }
  }

  // Keys [start, stop), two sections or what there is of them, for the tiles of a head. What a column
  // sees depends on whether its own section is behind them, the second or the first.
  void step_by_sections(int head, int start, int stop) {
    static_assert(kKeys == 2 * kSection);
    const int section = start / kSection;
    const int second = start + kSection, behind = start + kKeys;
    const int first = position_of(0), last = position_of(task_.num_columns - 1);
    const bool direct = first >= behind && Policy::reads_sections(task_.num_columns, format());
    if (!direct && head == 0) fetch_sections(behind);
    for (int i = 0; i < 2; i++) {
      if (last < start + (i + 1) * kSection) break;
      const Section from{format(), sections_[i] + head * section_bytes_};
      Widened& to = *s_.widened;
      const int offset = i * kSection * a_.head_dim;
      if (a_.kept_bits == 4) {
        widen_scales(from.key_scales(), from.format.num_scales(), to.scales[i]);
      } else {
        widen_scales(from.key_scales(), kSection, to.key_scales + i * kSection);
        widen_scales(from.value_scales(), kSection, to.value_scales + i * kSection);
      }
      if (!direct) widen(from, to.scales[i], to.keys + offset, to.values + offset);
    }
    if (direct) return step_directly(head, start, stop);
    if (last >= behind) step_by_sections(head, start, stop, -1, behind, INT_MAX);
    if (last >= second && first < behind)
      step_by_sections(head, start, stop, section + 1, second, behind);
    if (last >= start && first < second)
      step_by_sections(head, start, std::min(stop, second), section, start, second);
  }

  // For few columns, which see both as they were rounded.
  void step_directly(int head, int start, int stop) {
    Kept kept;
    kept.bits = a_.kept_bits;
    for (int i = 0; i < 2; i++) {
      kept.sections[i] = sections_[i] + head * section_bytes_;
      kept.scales[i] = s_.widened->scales[i];
      kept.next_sections[i] = kept.sections[i];
      if (!sections_[i + 2]) continue;
      kept.fetches = Policy::kFetches;
      kept.next_sections[i] = sections_[i + 2] + head * section_bytes_;
      for (int64_t at = 2 * format().integer_bytes(); at < section_bytes_; at += 64)
        prefetch(kept.next_sections[i] + at);
    }
    if (a_.kept_bits == 8) scale(kept, -1);
    for (int t = head * head_tiles_; t < (head + 1) * head_tiles_; t++)
      step(t, start, stop, kept, 0, INT_MAX);
  }

  // For columns at positions [from, to), which see the section `open` as bf16.
  void step_by_sections(int head, int start, int stop, int open, int from, int to) {
    const int kv_head = task_.kv_head + head, dims = a_.head_dim;
    Kept kept;
    for (int i = 0; i < kKeys / kSlots; i++) {
      const int at = std::min(start + i * kSlots, stop - 1), within = at % kSection / kSlots * kSlots;
      if (at / kSection == open) {
        const bf16* all = run_.open_section(a_, s_.fresh, open);
        kept.keys[i] = all + (int64_t(kv_head) * kSection + within) * dims;
        kept.values[i] = kept.keys[i] + int64_t(a_.num_kv_heads) * kSection * dims;
      } else {
        const int offset = (at - start) / kSlots * kSlots * dims;
        kept.keys[i] = s_.widened->keys + offset;
        kept.values[i] = s_.widened->values + offset;
      }
    }
    if (a_.kept_bits == 8) scale(kept, open - start / kSection);
    Policy::arrange(kept, stop - start, dims, s_.arranged);
    for (int t = head * head_tiles_; t < (head + 1) * head_tiles_; t++) {
      const int column = t % head_tiles_ * kRows;
      if (position_of(column) < to && position_of(column + columns_of(t) - 1) >= from)
        step(t, start, stop, kept, from, to);
    }
  }

  // The scales of two sections, of which number `open` is as it is.
  void scale(Kept& kept, int open) const {
    Widened& of = *s_.widened;
    kept.key_scales = of.key_scales;
    kept.value_scales = of.value_scales;
    if (open < 0) return;
    memcpy(of.own_key_scales, of.key_scales, sizeof of.key_scales);
    memcpy(of.own_value_scales, of.value_scales, sizeof of.value_scales);
    for (int i = open * kSection; i < kKeys; i++) of.own_key_scales[i] = of.own_value_scales[i] = 1;
    kept.key_scales = of.own_key_scales;
    kept.value_scales = of.own_value_scales;
  }

  void fetch_sections(int start) const {
    const int last = position_of(task_.num_columns - 1) / kSection;
    const int64_t bytes = section_bytes_ * task_.num_kv_heads;
    for (int section = start / kSection; section < std::min(last, (start + kKeys) / kSection);
         section++) {
      const uint8_t* at = run_.section(a_, section, task_.kv_head).at;
      for (int64_t i = 0; i < bytes; i += 64) prefetch(at + i);
    }
  }

  // The heads of a block lie one after the other.
  void fetch(int start) const {
    if (a_.kept_bits) return fetch_sections(start);
    const int64_t bytes = int64_t(kSlots) * a_.head_dim * 2;
    const int end = std::min(last_seen(task_.num_columns - 1) + 1, start + kKeys);
    for (int at = start; at < end; at += 16)
      for (int head = 0; head < task_.num_kv_heads; head++) {
        const char* key = (const char*)keys_at(at, task_.kv_head + head);
        const char* value = (const char*)values_at(at, task_.kv_head + head);
        for (int64_t i = 0; i < bytes; i += 64) {
          prefetch(key + i);
          prefetch(value + i);
        }
      }
  }

  // One step of the online softmax of a tile, over keys [start, stop), which columns at other positions
  // than [from_position, to_position) do not see.
  void step(int t, int start, int stop, const Kept& kept, int from_position, int to_position) {
    const int columns = columns_of(t);
    // What is behind `stop` is seen by no column.
    const int num_keys = (stop - start + Policy::kKeyStep - 1) / Policy::kKeyStep * Policy::kKeyStep;
    Policy::scores(queries_of(t), columns, kept, num_keys, a_.head_dim, s_.scores);
    const float scale = a_.softcap != 0 ? 1.f : a_.scale;
    alignas(64) float factors[kRows];
    const bool plain = num_keys == kKeys && a_.softcap == 0 &&
                       sees_all_of(t, start, from_position, to_position);
    for (int from = 0; from < columns; from += kLanes) {
      F most[kLanes];
      for (int i = 0; i < kLanes; i++) {
        const int c = from + i;
        if (c >= columns)
          most[i] = splat(kUnseen);
        else
          most[i] = plain ? highest_of(s_.scores[c], kept.key_scales)
                          : mask_and_maximize(t, c, start, num_keys, kept.key_scales,
                                              from_position, to_position);
      }
      const F before = load(s_.maxima[t] + from);
      const F now = maximum(before, maxima_of(most) * splat(scale));
      store(s_.maxima[t] + from, now);
      store(factors + from, exp2_of(before - now));
    }
    const F by = splat(scale);
    for (int c = 0; c < columns; c++) {
      const F top = splat(s_.maxima[t][c]), factor = splat(factors[c]);
      float* scores = s_.scores[c];
      F sum = splat(0.f);
      for (int i = 0; i < num_keys; i += kLanes) {
        const F p = exp2_of(load(scores + i) * by - top);
        Policy::store_weights(s_.weights[c] + i,
                              kept.value_scales ? p * load(kept.value_scales + i) : p);
        sum = sum + p;
      }
      store(s_.sums[t][c], fma(load(s_.sums[t][c]), factor, sum));
      if (factors[c] != 1.f) {
        float* o = output_of(t) + c * dims_;
        for (int d = 0; d < dims_; d += kLanes) store(o + d, load(o + d) * factor);
      }
    }
    Policy::add_values(s_.weights, columns, kept, s_.arranged, stop - start, a_.head_dim,
                       output_of(t));
  }

  // Whether each of a tile's columns sees all of the kKeys keys from `start` on.
  bool sees_all_of(int t, int start, int from, int to) const {
    const int column = t % head_tiles_ * kRows;
    const int first = position_of(column), last = position_of(column + columns_of(t) - 1);
    return first >= from && last < to &&
           run_.last_seen(a_, first) >= start + kKeys - 1 &&
           (!a_.window || last - a_.window + 1 <= start);
  }
  // Of kKeys scores, which are then times `key_scales`, where there are any.
  static F highest_of(float* scores, const float* key_scales) {
    if (key_scales)
      for (int i = 0; i < kKeys; i += kLanes)
        store(scores + i, load(scores + i) * load(key_scales + i));
    F most = load(scores);
    for (int i = kLanes; i < kKeys; i += kLanes) most = maximum(most, load(scores + i));
    return most;
  }

  // What the column must not see gets a score far below all others. Returns the highest of each lane.
  // With a soft cap the scores are in units of the softmax's exponent from here on.
  F mask_and_maximize(int t, int c, int start, int num_keys, const float* key_scales, int from,
                      int to) {
    const int position = position_of(t % head_tiles_ * kRows + c);
    const int oldest = a_.window ? position - a_.window + 1 : 0;
    const int newest = position >= from && position < to ? run_.last_seen(a_, position) : -1;
    const bool hides = newest < start + num_keys - 1 || oldest > start;
    const F cap = splat(a_.softcap), scale = splat(a_.scale);
    float* scores = s_.scores[c];
    F most = splat(kUnseen);
    for (int i = 0; i < num_keys; i += kLanes) {
      F x = load(scores + i);
      if (key_scales) x = x * load(key_scales + i);
      if (a_.softcap != 0) x = cap * tanh_of(x * scale / cap);
      if (hides) {
        const Int at = lane_index() + (start + i);
        x = (at <= newest) & (at >= oldest) ? x : splat(kUnseen);
      }
      if (hides || key_scales || a_.softcap != 0) store(scores + i, x);
      most = maximum(most, x);
    }
    return most;
  }

  // Add a finished partition to `total`.
  void merge(int t, float* total) {
    alignas(64) float sums[kRows] = {};
    for (int c = 0; c < columns_of(t); c++) sums[c] = sum_lanes(load(s_.sums[t][c]));
    merge_partial(total, s_.maxima[t], sums, output_of(t), columns_of(t), dims_);
  }

  const Attention& a_;
  const Run& run_;
  const Task& task_;
  AttentionScratch<Policy>& s_;
  const int group_, dims_, head_tiles_, num_tiles_;
  const int64_t section_bytes_;  // of a head
  uint8_t* sections_[4];  // two, and the two behind them; null where they are not rounded yet
};
