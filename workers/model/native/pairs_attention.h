// Attention by products of pairs: scores by pairs of a head's elements, values by pairs of tokens.
//
// Few columns read sections that are quantized where they lie: what is widened for more of them is
// written, and read for each four.
#pragma once
#include <type_traits>

#include "attention.h"
#include "pair_vector.h"

// A pair of vectors' worth of keys of kSlots tokens, or of values of a pair of tokens.
struct Bf16Pairs {
  const bf16 *at[kKeys / kSlots], *next[kKeys / kSlots];
  int dims;

  Bf16Pairs(const bf16* const* from, const bf16* const* behind, int head_dim) : dims(head_dim) {
    std::copy(from, from + kKeys / kSlots, at);
    std::copy(behind, behind + kKeys / kSlots, next);
  }
  void fetch_key(int slots, int d, int part) const {
    prefetch(next[slots] + d * kSlots + 2 * kLanes * part);
  }
  void fetch_value(int slots, int pair, int d, int index) const {
    prefetch(next[slots] + 2 * (pair * dims + d + kLanes * index));
  }
  PairVector key(int slots, int d, int part) const {
    return load_pairs(at[slots] + d * kSlots + 2 * kLanes * part);
  }
  // The vector of that index from element `d` on.
  PairVector value(int slots, int pair, int d, int index) const {
    return load_pairs(at[slots] + 2 * (pair * dims + d + kLanes * index));
  }
  PairVector last_value(int slots, int pair, int d) const {
    return load_pairs(at[slots] + 2 * (pair * dims + d), dims - d);
  }
};

#if defined(__AVX512BF16__)

// The keys or values at `offset` of two sections. What is fetched of the next ones is whole lines.
struct BytePairs {
  const int8_t *at[kKeys / kSlots], *next[kKeys / kSlots];
  int dims;

  BytePairs(const Kept& kept, int64_t offset, int head_dim) : dims(head_dim) {
    for (int i = 0; i < kKeys / kSlots; i++) {
      const int64_t half = offset + i % 2 * kSlots * head_dim;
      at[i] = (const int8_t*)kept.sections[i / 2] + half;
      next[i] = (const int8_t*)kept.next_sections[i / 2] + half;
    }
  }
  void fetch_key(int slots, int d, int) const {
    if (d % 4 == 0) prefetch(next[slots] + d * kSlots);
  }
  void fetch_value(int slots, int pair, int d, int index) const {
    if (index % 2 == 0) prefetch(next[slots] + 2 * (pair * dims + d + kLanes * index));
  }
  static PairVector load(const int8_t* p) {
    return _mm512_cvtne2ps_pbh(__builtin_convertvector(signed_bytes(p + kLanes), F),
                               __builtin_convertvector(signed_bytes(p), F));
  }
  PairVector key(int slots, int d, int) const { return load(at[slots] + d * kSlots); }
  PairVector value(int slots, int pair, int d, int index) const {
    return load(at[slots] + 2 * (pair * dims + d + kLanes * index));
  }
  PairVector last_value(int slots, int pair, int d) const { return value(slots, pair, d, 0); }
};

struct HalfBytePairs {
  const uint8_t *at[kKeys / kSlots], *next[kKeys / kSlots];
  const float* scales[kKeys / kSlots];
  int dims, minima, parts;

  // Their scales are at `scales_from` of all, those of the second 16 tokens `tokens` further, and the
  // minima `behind_scales`.
  HalfBytePairs(const Kept& kept, int64_t offset, int scales_from, int behind_scales, int tokens,
                int head_dim)
      : dims(head_dim), minima(behind_scales), parts(std::max(1, head_dim / 64)) {
    for (int i = 0; i < kKeys / kSlots; i++) {
      const int64_t half = offset + i % 2 * kSlots / 2 * head_dim;
      at[i] = kept.sections[i / 2] + half;
      next[i] = kept.next_sections[i / 2] + half;
      scales[i] = kept.scales[i / 2] + scales_from + i % 2 * tokens;
    }
  }
  void fetch_key(int slots, int d, int) const {
    if (d % 8 == 0) prefetch(next[slots] + d * kSlots / 2);
  }
  void fetch_value(int slots, int pair, int d, int index) const {
    if (index == 0) prefetch(next[slots] + pair * dims + d);
  }
  // What each half of a byte is, low and high, is looked up: that is less to do than to compute it.
  PairVector load(const uint8_t* p, const float* both) const {
    const F integers = __builtin_convertvector(lane_index(), F);
    const F low = fma(integers, splat(both[0]), splat(both[minima]));
    const F high = fma(integers, splat(both[1]), splat(both[minima + 1]));
    const __m512i table = (__m512i)_mm512_cvtne2ps_pbh(high, low), x = (__m512i)bytes(p);
    const __m512i halves = _mm512_ternarylogic_epi32(x, _mm512_slli_epi32(x, 12),
                                                     _mm512_set1_epi32(0x000f000f), 0xa8);
    return (PairVector)_mm512_permutexvar_epi16(
        _mm512_or_si512(halves, _mm512_set1_epi32(0x00100000)), table);
  }
  PairVector key(int slots, int d, int) const {
    return load(at[slots] + d * kSlots / 2, scales[slots] + d);
  }
  PairVector value(int slots, int pair, int d, int index) const {
    const int part = parts == 1 ? 0 : d / 64;
    return load(at[slots] + pair * dims + d + kLanes * index,
                scales[slots] + part * kSection + 2 * pair);
  }
  PairVector last_value(int slots, int pair, int d) const { return value(slots, pair, d, 0); }
};

#endif

struct PairsAttention {
  using Query = bf16;   // [column][padded(head_dim)]
  using Weight = bf16;  // [column][key]
  struct Arranged {};
  static constexpr int kKeyStep = kSlots;
  static constexpr bool kFetches = true;

#if defined(__AVX512BF16__)
  static bool reads_sections(int columns, const SectionFormat& format) {
    return columns <= 4 && format.dims % kLanes == 0 &&
           (format.num_parts() == 1 || format.part_dims() == 64);
  }
#else
  static bool reads_sections(int, const SectionFormat&) { return false; }
#endif

  static void load_queries(const bf16* const rows[kRows], int columns, int head_dim, Query* to) {
    const int dims = padded(head_dim);
    for (int c = 0; c < columns; c++) memcpy(to + c * dims, rows[c], size_t(head_dim) * 2);
  }

  static void arrange(const Kept&, int, int, Arranged&) {}

  static void scores(const Query* queries, int columns, const Kept& kept, int num_keys,
                     int head_dim, float (*out)[kKeys]) {
    const int dims = padded(head_dim);
    const auto by = [&](const auto& keys) {
      by_fours(columns, kept.fetches, [&](auto num_columns, auto fetches, int c) {
        scores_of<num_columns, fetches>(queries + c * dims, keys, num_keys, head_dim, out + c);
      });
    };
#if defined(__AVX512BF16__)
    if (kept.bits == 8) return by(BytePairs(kept, 0, head_dim));
    if (kept.bits == 4)
      return by(HalfBytePairs(kept, 0, 0, head_dim, 0, head_dim));
#endif
    by(Bf16Pairs(kept.keys, kept.next_keys, head_dim));
  }

  static void store_weights(Weight* to, F p) { store16(to, p); }

  static void add_values(const Weight (*weights)[kKeys], int columns, const Kept& kept,
                         const Arranged&, int num_keys, int head_dim, float* output) {
    const int dims = padded(head_dim);
    const auto by = [&](const auto& values) {
      by_fours(columns, kept.fetches, [&](auto num_columns, auto fetches, int c) {
        add_to<num_columns, fetches>(weights + c, values, num_keys, head_dim, output + c * dims);
      });
    };
#if defined(__AVX512BF16__)
    const SectionFormat format{kept.bits, head_dim};
    const int64_t behind_keys = format.integer_bytes();
    if (kept.bits == 8) return by(BytePairs(kept, behind_keys, head_dim));
    if (kept.bits == 4)
      return by(HalfBytePairs(kept, behind_keys, 2 * head_dim, kSection * format.num_parts(), kSlots,
                              head_dim));
#endif
    by(Bf16Pairs(kept.values, kept.next_values, head_dim));
  }

 private:
  static constexpr int kVectors = kSlots / kLanes;  // of keys that lie together
  static constexpr int kTogether = kLanes / 4;      // such groups of keys, as far as registers go

  // Calls call(num_columns, fetches, first column) for four columns at a time, and for those left. The
  // first call fetches, if any is to.
  template <class Call>
  static void by_fours(int columns, bool fetches, Call call) {
    if (!fetches) return by_fours<false>(0, columns, call);
    few<true>(0, std::min(columns, 4), call);
    by_fours<false>(4, columns, call);
  }
  template <bool kFetch, class Call>
  static void by_fours(int from, int columns, Call call) {
    for (int c = from; c < columns; c += 4) few<kFetch>(c, std::min(columns - c, 4), call);
  }
  template <bool kFetch, class Call>
  static void few(int from, int count, Call call) {
    const std::bool_constant<kFetch> fetches;
    switch (count) {
      case 4: return call(std::integral_constant<int, 4>(), fetches, from);
      case 3: return call(std::integral_constant<int, 3>(), fetches, from);
      case 2: return call(std::integral_constant<int, 2>(), fetches, from);
      case 1: return call(std::integral_constant<int, 1>(), fetches, from);
    }
  }

  template <int C, bool kFetch, class Keys>
  static void scores_of(const Query* queries, const Keys& keys, int num_keys, int head_dim,
                        float (*out)[kKeys]) {
    int key = 0;
    for (; key + kTogether * kSlots <= num_keys; key += kTogether * kSlots)
      scores_of<C, kTogether, kFetch>(queries, keys, head_dim, key, out);
    if constexpr (kTogether > 1) {
      for (; key + 2 * kSlots <= num_keys; key += 2 * kSlots)
        scores_of<C, 2, kFetch>(queries, keys, head_dim, key, out);
      if (key < num_keys) scores_of<C, 1, kFetch>(queries, keys, head_dim, key, out);
    }
  }
  // C columns with S groups of keys from `key` on.
  template <int C, int S, bool kFetch, class Keys>
  static void scores_of(const Query* queries, const Keys& keys, int head_dim, int key,
                        float (*out)[kKeys]) {
    constexpr int kAll = S * kVectors;
    const int dims = padded(head_dim), first = key / kSlots;
    F sums[C][kAll];
    UNROLLED for (int c = 0; c < C; c++)
      UNROLLED for (int i = 0; i < kAll; i++) sums[c][i] = splat(0.f);
    for (int d = 0; d < head_dim; d += 2) {
      PairVector k[kAll];
      UNROLLED for (int i = 0; i < kAll; i++) {
        k[i] = keys.key(first + i / kVectors, d, i % kVectors);
        if (kFetch) keys.fetch_key(first + i / kVectors, d, i % kVectors);
      }
      UNROLLED for (int c = 0; c < C; c++) {
        const PairVector q = splat_pair(queries + c * dims + d);
        UNROLLED for (int i = 0; i < kAll; i++) sums[c][i] = add_products(sums[c][i], k[i], q);
      }
    }
    UNROLLED for (int c = 0; c < C; c++)
      UNROLLED for (int i = 0; i < kAll; i++) store(out[c] + key + i * kLanes, sums[c][i]);
  }

  template <int C, bool kFetch, class Values>
  static void add_to(const Weight (*weights)[kKeys], const Values& values, int num_keys,
                     int head_dim, float* output) {
    int d = 0;
    for (; d + 4 * kLanes <= head_dim; d += 4 * kLanes)
      add_to<C, 4, kFetch>(weights, values, num_keys, head_dim, d, output);
    for (; d < head_dim; d += kLanes)
      add_to<C, 1, kFetch>(weights, values, num_keys, head_dim, d, output);
  }
  // D vectors of C columns, from element `d` on; of a single one what the head has.
  template <int C, int D, bool kFetch, class Values>
  static void add_to(const Weight (*weights)[kKeys], const Values& values, int num_keys,
                     int head_dim, int d, float* output) {
    const int dims = padded(head_dim);
    F sums[C][D];
    UNROLLED for (int c = 0; c < C; c++)
      UNROLLED for (int i = 0; i < D; i++) sums[c][i] = load(output + c * dims + d + kLanes * i);
    for (int key = 0; key < num_keys; key += kSlots) {
      const int pairs = num_keys - key < kSlots ? (num_keys - key + 1) / 2 : kSlots / 2;
      for (int pair = 0; pair < pairs; pair++) {
        PairVector v[D];
        UNROLLED for (int i = 0; i < D; i++) {
          v[i] = D == 1 ? values.last_value(key / kSlots, pair, d)
                        : values.value(key / kSlots, pair, d, i);
          if (kFetch) values.fetch_value(key / kSlots, pair, d, i);
        }
        UNROLLED for (int c = 0; c < C; c++) {
          const PairVector p = splat_pair(weights[c] + key + 2 * pair);
          UNROLLED for (int i = 0; i < D; i++) sums[c][i] = add_products(sums[c][i], v[i], p);
        }
      }
    }
    UNROLLED for (int c = 0; c < C; c++)
      UNROLLED for (int i = 0; i < D; i++) store(output + c * dims + d + kLanes * i, sums[c][i]);
  }
};
