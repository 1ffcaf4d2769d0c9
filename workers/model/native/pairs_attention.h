// Attention by products of pairs: scores by pairs of a head's elements, values by pairs of tokens.
//
// Few columns read sections that are quantized where they lie: what is widened for more of them is
// written, and read for each four.
#pragma once
#include "attention.h"
#include "pair_vector.h"

// A pair of vectors' worth of keys of kSlots tokens, or of values of a pair of tokens.
struct Bf16Pairs {
  const bf16* at[kKeys / kSlots];
  int dims;

  Bf16Pairs(const bf16* const* from, int head_dim) : dims(head_dim) {
    std::copy(from, from + kKeys / kSlots, at);
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

struct BytePairs {
  const int8_t* at[kKeys / kSlots];
  int dims;

  BytePairs(const uint8_t* const sections[2], int64_t offset, int head_dim) : dims(head_dim) {
    for (int i = 0; i < kKeys / kSlots; i++)
      at[i] = (const int8_t*)sections[i / 2] + offset + i % 2 * kSlots * head_dim;
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
  const uint8_t* at[kKeys / kSlots];
  const float* scales[kKeys / kSlots];
  int dims, minima, parts;

  // `behind_scales`: how far the minima are.
  HalfBytePairs(const uint8_t* const sections[2], const float* const all_scales[2], int64_t offset,
                int scales_from, int behind_scales, int tokens, int head_dim)
      : dims(head_dim), minima(behind_scales), parts(std::max(1, head_dim / 64)) {
    for (int i = 0; i < kKeys / kSlots; i++) {
      at[i] = sections[i / 2] + offset + i % 2 * kSlots / 2 * head_dim;
      scales[i] = all_scales[i / 2] + scales_from + i % 2 * tokens;
    }
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
#if defined(__AVX512BF16__)
    if (kept.bits == 8)
      return scores_by(queries, columns, BytePairs(kept.sections, 0, head_dim), num_keys, head_dim,
                       out);
    if (kept.bits == 4)
      return scores_by(queries, columns,
                       HalfBytePairs(kept.sections, kept.scales, 0, 0, head_dim, 0, head_dim),
                       num_keys, head_dim, out);
#endif
    scores_by(queries, columns, Bf16Pairs(kept.keys, head_dim), num_keys, head_dim, out);
  }

  static void store_weights(Weight* to, F p) { store16(to, p); }

  static void add_values(const Weight (*weights)[kKeys], int columns, const Kept& kept,
                         const Arranged&, int num_keys, int head_dim, float* output) {
#if defined(__AVX512BF16__)
    const int64_t behind_keys = SectionFormat{kept.bits, head_dim}.integer_bytes();
    if (kept.bits == 8)
      return add_by(weights, columns, BytePairs(kept.sections, behind_keys, head_dim), num_keys,
                    head_dim, output);
    if (kept.bits == 4) {
      const int minima = kSection * SectionFormat{4, head_dim}.num_parts();
      return add_by(weights, columns,
                    HalfBytePairs(kept.sections, kept.scales, behind_keys, 2 * head_dim, minima,
                                  kSlots, head_dim),
                    num_keys, head_dim, output);
    }
#endif
    add_by(weights, columns, Bf16Pairs(kept.values, head_dim), num_keys, head_dim, output);
  }

 private:
  template <class Keys>
  static void scores_by(const Query* queries, int columns, const Keys& keys, int num_keys,
                        int head_dim, float (*out)[kKeys]) {
    const int dims = padded(head_dim);
    int c = 0;
    for (; c + 4 <= columns; c += 4)
      scores_of<4>(queries + c * dims, keys, num_keys, head_dim, out + c);
    switch (columns - c) {
      case 3: return scores_of<3>(queries + c * dims, keys, num_keys, head_dim, out + c);
      case 2: return scores_of<2>(queries + c * dims, keys, num_keys, head_dim, out + c);
      case 1: return scores_of<1>(queries + c * dims, keys, num_keys, head_dim, out + c);
    }
  }

  template <class Values>
  static void add_by(const Weight (*weights)[kKeys], int columns, const Values& values,
                     int num_keys, int head_dim, float* output) {
    const int dims = padded(head_dim);
    int c = 0;
    for (; c + 4 <= columns; c += 4)
      add_to<4>(weights + c, values, num_keys, head_dim, output + c * dims);
    switch (columns - c) {
      case 3: return add_to<3>(weights + c, values, num_keys, head_dim, output + c * dims);
      case 2: return add_to<2>(weights + c, values, num_keys, head_dim, output + c * dims);
      case 1: return add_to<1>(weights + c, values, num_keys, head_dim, output + c * dims);
    }
  }

  static constexpr int kVectors = kSlots / kLanes;  // of keys that lie together
  static constexpr int kTogether = kLanes / 4;      // such groups of keys, as far as registers go

  template <int C, class Keys>
  static void scores_of(const Query* queries, const Keys& keys, int num_keys, int head_dim,
                        float (*out)[kKeys]) {
    int key = 0;
    for (; key + kTogether * kSlots <= num_keys; key += kTogether * kSlots)
      scores_of<C, kTogether>(queries, keys, head_dim, key, out);
    if constexpr (kTogether > 1) {
      for (; key + 2 * kSlots <= num_keys; key += 2 * kSlots)
        scores_of<C, 2>(queries, keys, head_dim, key, out);
      if (key < num_keys) scores_of<C, 1>(queries, keys, head_dim, key, out);
    }
  }
  // C columns with S groups of keys from `key` on.
  template <int C, int S, class Keys>
  static void scores_of(const Query* queries, const Keys& keys, int head_dim, int key,
                        float (*out)[kKeys]) {
    constexpr int kAll = S * kVectors;
    const int dims = padded(head_dim), first = key / kSlots;
    F sums[C][kAll];
    for (int c = 0; c < C; c++)
      for (int i = 0; i < kAll; i++) sums[c][i] = splat(0.f);
    for (int d = 0; d < head_dim; d += 2) {
      PairVector k[kAll];
      for (int i = 0; i < kAll; i++)
        k[i] = keys.key(first + i / kVectors, d, i % kVectors);
      for (int c = 0; c < C; c++) {
        const PairVector q = splat_pair(queries + c * dims + d);
        for (int i = 0; i < kAll; i++) sums[c][i] = add_products(sums[c][i], k[i], q);
      }
    }
    for (int c = 0; c < C; c++)
      for (int i = 0; i < kAll; i++) store(out[c] + key + i * kLanes, sums[c][i]);
  }

  template <int C, class Values>
  static void add_to(const Weight (*weights)[kKeys], const Values& values, int num_keys,
                     int head_dim, float* output) {
    int d = 0;
    for (; d + 4 * kLanes <= head_dim; d += 4 * kLanes)
      add_to<C, 4>(weights, values, num_keys, head_dim, d, output);
    for (; d < head_dim; d += kLanes) add_to<C, 1>(weights, values, num_keys, head_dim, d, output);
  }
  // D vectors of C columns, from element `d` on; of a single one what the head has.
  template <int C, int D, class Values>
  static void add_to(const Weight (*weights)[kKeys], const Values& values, int num_keys,
                     int head_dim, int d, float* output) {
    const int dims = padded(head_dim);
    F sums[C][D];
    for (int c = 0; c < C; c++)
      for (int i = 0; i < D; i++) sums[c][i] = load(output + c * dims + d + kLanes * i);
    for (int key = 0; key < num_keys; key += kSlots) {
      const int pairs = num_keys - key < kSlots ? (num_keys - key + 1) / 2 : kSlots / 2;
      for (int pair = 0; pair < pairs; pair++) {
        PairVector v[D];
        for (int i = 0; i < D; i++)
          v[i] = D == 1 ? values.last_value(key / kSlots, pair, d)
                        : values.value(key / kSlots, pair, d, i);
        for (int c = 0; c < C; c++) {
          const PairVector p = splat_pair(weights[c] + key + 2 * pair);
          for (int i = 0; i < D; i++) sums[c][i] = add_products(sums[c][i], v[i], p);
        }
      }
    }
    for (int c = 0; c < C; c++)
      for (int i = 0; i < D; i++) store(output + c * dims + d + kLanes * i, sums[c][i]);
  }
};
