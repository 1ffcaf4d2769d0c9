// Keys and values of 8 or 4 bits, and the way there and back.
//
// A section is 32 tokens whose keys and values, a head's, are rounded together once all are there. Until
// then they are kept as they are, bf16, in the order that attention.h says, and what is widened comes in
// that order, too. A section of a head is one piece of memory:
//
//   keys      8 bits: [token / 16][head_dim / 2][16][2], of 4: [token / 16][head_dim / 2][16], where a
//             byte has an element in its low half and the next one in its high half
//   values    8 bits: [token / 2][head_dim][2], of 4: [token / 2][head_dim], a byte has two tokens'
//   scales    bf16; of 8 bits: keys' [32], values' [32]; of 4: keys' scales [head_dim] and minima
//             [head_dim], values' scales [parts][32] and minima [parts][32]
//
// An element is scale * integer, of 4 bits scale * integer + minimum. Of 8 bits a scale is one token's;
// of 4 it is one element's of all the section's keys, and of values one token's, of each part of about
// 64 elements (Z. Liu et al., "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache",
// arXiv:2402.02750). Invariants: what is widened depends on the section alone; what is no number before
// is none behind.
#pragma once
#include <algorithm>

#include "vector.h"

constexpr int kSlots = 16;  // tokens whose keys lie together
constexpr int kSection = 32;

struct SectionFormat {
  int bits, dims;

  int num_parts() const { return bits == 4 ? std::max(1, dims / 64) : 1; }
  int part_dims() const { return (dims + num_parts() - 1) / num_parts(); }
  int64_t integer_bytes() const { return int64_t(kSection) * dims * bits / 8; }
  int num_scales() const { return bits == 4 ? 2 * dims + 2 * kSection * num_parts() : 2 * kSection; }
  int64_t bytes() const { return (2 * (integer_bytes() + num_scales()) + 63) / 64 * 64; }
};

struct Section {
  const SectionFormat format;
  uint8_t* const at;

  uint8_t* keys() const { return at; }
  uint8_t* values() const { return at + format.integer_bytes(); }
  bf16* key_scales() const { return (bf16*)(at + 2 * format.integer_bytes()); }
  bf16* key_minima() const { return key_scales() + format.dims; }
  bf16* value_scales() const {
    return key_scales() + (format.bits == 4 ? 2 * format.dims : kSection);
  }
  bf16* value_minima() const { return value_scales() + kSection * format.num_parts(); }
};

// --- rounding

inline int nearest(float x, float least, float most) {
  return int(lrintf(x < least ? least : x > most ? most : x));
}

// What symmetric integers of 8 bits are times; NaN where something is.
struct Widest {
  float most = 0, wrong = 0;
  void take(float x) {
    most = std::max(most, fabsf(x));
    wrong += x - x;
  }
  bf16 scale() const { return round_one(most / 127 + wrong); }
};
// The same of unsigned ones of 4, with what is added.
struct Range {
  float least = INFINITY, most = -INFINITY, wrong = 0;
  void take(float x) {
    least = std::min(least, x);
    most = std::max(most, x);
    wrong += x - x;
  }
  bf16 scale() const { return round_one((most - least) / 15 + wrong); }
  bf16 minimum() const { return round_one(least + wrong); }
};

inline float inverse_of(bf16 scale) { return one(scale) != 0 ? 1 / one(scale) : 0; }

inline void round_keys8(const Section& to, const bf16* keys) {
  const int dims = to.format.dims;
  for (int half = 0; half < kSection / kSlots; half++) {
    const bf16* from = keys + half * kSlots * dims;
    int8_t* integers = (int8_t*)to.keys() + half * kSlots * dims;
    Widest widest[2 * kSlots];
    float inverse[2 * kSlots];
    for (int d = 0; d < dims; d += 2)
      for (int i = 0; i < 2 * kSlots; i++) widest[i].take(one(from[d * kSlots + i]));
    for (int token = 0; token < kSlots; token++) {
      Widest& all = widest[2 * token];
      all.most = std::max(all.most, widest[2 * token + 1].most);
      all.wrong += widest[2 * token + 1].wrong;
      const bf16 scale = all.scale();
      to.key_scales()[half * kSlots + token] = scale;
      inverse[2 * token] = inverse[2 * token + 1] = inverse_of(scale);
    }
    for (int d = 0; d < dims; d += 2)
      for (int i = 0; i < 2 * kSlots; i++)
        integers[d * kSlots + i] =
            int8_t(nearest(one(from[d * kSlots + i]) * inverse[i], -127, 127));
  }
}

inline void round_values8(const Section& to, const bf16* values) {
  const int dims = to.format.dims;
  for (int pair = 0; pair < kSection / 2; pair++) {
    const bf16* from = values + pair * 2 * dims;
    int8_t* integers = (int8_t*)to.values() + pair * 2 * dims;
    for (int token = 0; token < 2; token++) {
      Widest widest;
      for (int d = 0; d < dims; d++) widest.take(one(from[2 * d + token]));
      const bf16 scale = widest.scale();
      to.value_scales()[2 * pair + token] = scale;
      const float inverse = inverse_of(scale);
      for (int d = 0; d < dims; d++)
        integers[2 * d + token] = int8_t(nearest(one(from[2 * d + token]) * inverse, -127, 127));
    }
  }
}

inline void round_keys4(const Section& to, const bf16* keys) {
  const int dims = to.format.dims;
  for (int d = 0; d < dims; d += 2) {
    Range ranges[2];
    float inverse[2], minimum[2];
    for (int half = 0; half < kSection / kSlots; half++)
      for (int i = 0; i < 2 * kSlots; i++)
        ranges[i % 2].take(one(keys[(half * dims + d) * kSlots + i]));
    for (int i = 0; i < 2; i++) {
      to.key_scales()[d + i] = ranges[i].scale();
      to.key_minima()[d + i] = ranges[i].minimum();
      inverse[i] = inverse_of(to.key_scales()[d + i]);
      minimum[i] = one(to.key_minima()[d + i]);
    }
    for (int half = 0; half < kSection / kSlots; half++)
      for (int token = 0; token < kSlots; token++) {
        const bf16* from = keys + (half * dims + d) * kSlots + 2 * token;
        int both = 0;
        for (int i = 0; i < 2; i++)
          both |= nearest((one(from[i]) - minimum[i]) * inverse[i], 0, 15) << 4 * i;
        to.keys()[(half * dims + d) * kSlots / 2 + token] = uint8_t(both);
      }
  }
}

inline void round_values4(const Section& to, const bf16* values) {
  const int dims = to.format.dims, width = to.format.part_dims();
  for (int pair = 0; pair < kSection / 2; pair++)
    for (int part = 0; part < to.format.num_parts(); part++) {
      const int begin = part * width, end = std::min(dims, begin + width);
      const bf16* from = values + pair * 2 * dims;
      float inverse[2], minimum[2];
      for (int token = 0; token < 2; token++) {
        Range range;
        for (int d = begin; d < end; d++) range.take(one(from[2 * d + token]));
        const int place = part * kSection + 2 * pair + token;
        to.value_scales()[place] = range.scale();
        to.value_minima()[place] = range.minimum();
        inverse[token] = inverse_of(to.value_scales()[place]);
        minimum[token] = one(to.value_minima()[place]);
      }
      for (int d = begin; d < end; d++) {
        int both = 0;
        for (int token = 0; token < 2; token++)
          both |= nearest((one(from[2 * d + token]) - minimum[token]) * inverse[token], 0, 15)
                  << 4 * token;
        to.values()[pair * dims + d] = uint8_t(both);
      }
    }
}

inline void round_keys(const Section& to, const bf16* keys) {
  to.format.bits == 4 ? round_keys4(to, keys) : round_keys8(to, keys);
}
inline void round_values(const Section& to, const bf16* values) {
  to.format.bits == 4 ? round_values4(to, values) : round_values8(to, values);
}

// --- widening: up to a vector of pairs more than the section's is written. Of 8 bits no number is
// rounded on the way: scales are for the products

// kLanes integers.
inline Int signed_bytes(const int8_t* p) {
#if defined(__AVX512F__)
  return (Int)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif defined(__AVX2__)
  return (Int)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
  using Bytes = int8_t __attribute__((vector_size(kLanes)));
  Bytes x;
  memcpy(&x, p, sizeof x);
  return __builtin_convertvector(x, Int);
#endif
}
inline Int bytes(const uint8_t* p) {
#if defined(__AVX512F__)
  return (Int)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif defined(__AVX2__)
  return (Int)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
  using Bytes = uint8_t __attribute__((vector_size(kLanes)));
  Bytes x;
  memcpy(&x, p, sizeof x);
  return __builtin_convertvector(x, Int);
#endif
}

// Integers of 8 bits, which bf16 can hold: `count` of them, a multiple of 32.
inline void widen8(const int8_t* from, int count, bf16* to) {
  for (int i = 0; i < count; i += 2 * kLanes) {
    const F first = __builtin_convertvector(signed_bytes(from + i), F);
    const F second = __builtin_convertvector(signed_bytes(from + i + kLanes), F);
#if defined(__AVX512BF16__)
    _mm512_storeu_si512(to + i, (__m512i)_mm512_cvtne2ps_pbh(second, first));
#else
    store16(to + i, first);
    store16(to + i + kLanes, second);
#endif
  }
}

// kLanes pairs, of finite numbers.
inline Int pairs_of(F first, F second) {
  const Int low = (Int)first >> 16 & 0xffff, high = (Int)second >> 16 & 1;
  return (((Int)first + 0x7fff + (low & 1)) >> 16 & 0xffff) |
         (((Int)second + 0x7fff + high) & ~0xffff);
}

// Of each byte the low half by one scale, the high half by another.
inline Int widened4(const uint8_t* from, F scale0, F minimum0, F scale1, F minimum1) {
  const Int x = bytes(from);
  return pairs_of(fma(__builtin_convertvector(x & 15, F), scale0, minimum0),
                  fma(__builtin_convertvector(x >> 4, F), scale1, minimum1));
}
inline void widen4(const uint8_t* from, F scale0, F minimum0, F scale1, F minimum1, bf16* to) {
  const Int pairs = widened4(from, scale0, minimum0, scale1, minimum1);
  memcpy(to, &pairs, sizeof pairs);
}

// `scales`: all of the section's, in their order.
inline void widen_keys4(const Section& from, const float* scales, bf16* keys) {
  const int dims = from.format.dims;
  const float* minima = scales + dims;
  for (int d = 0; d < dims; d += 2) {
    const F scale0 = splat(scales[d]), scale1 = splat(scales[d + 1]);
    const F least0 = splat(minima[d]), least1 = splat(minima[d + 1]);
    for (int half = 0; half < kSection / kSlots; half++) {
      const int at = (half * dims + d) * kSlots;
      for (int i = 0; i < kSlots; i += kLanes)
        widen4(from.keys() + at / 2 + i, scale0, least0, scale1, least1, keys + at + 2 * i);
    }
  }
}

inline void widen_values4(const Section& from, const float* scales, bf16* values) {
  const int dims = from.format.dims, width = from.format.part_dims();
  const float* minima = scales + kSection * from.format.num_parts();
  for (int pair = 0; pair < kSection / 2; pair++)
    for (int part = 0; part < from.format.num_parts(); part++) {
      const int token = part * kSection + 2 * pair, at = pair * dims;
      const F scale0 = splat(scales[token]), scale1 = splat(scales[token + 1]);
      const F least0 = splat(minima[token]), least1 = splat(minima[token + 1]);
      for (int d = part * width; d < std::min(dims, (part + 1) * width); d += kLanes)
        widen4(from.values() + at + d, scale0, least0, scale1, least1, values + 2 * (at + d));
    }
}

// Scales; there is room for a vector more.
inline void widen_scales(const bf16* from, int count, float* scales) {
  for (int i = 0; i < count; i += kLanes) store(scales + i, load16(from + i));
}

// All of a section; of 8 bits the integers.
inline void widen(const Section& from, const float* scales, bf16* keys, bf16* values) {
  if (from.format.bits == 4) {
    widen_keys4(from, scales, keys);
    widen_values4(from, scales + 2 * from.format.dims, values);
    return;
  }
  const int count = kSection * from.format.dims;
  widen8((const int8_t*)from.keys(), count, keys);
  widen8((const int8_t*)from.values(), count, values);
}
