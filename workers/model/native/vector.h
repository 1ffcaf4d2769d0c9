// Vectors of fp32 and their steps to and from bf16, on every instruction set.
//
// F has as many lanes as the set's registers. What the compiler's own vectors can't say is said here
// once for each set: all else uses F's operators. Invariant: each function rounds as its scalar
// counterpart does, so a lane's result does not depend on its neighbours.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "platform.h"

// Of what takes a registerful of vectors: out of line it would take them from memory. AVX2 has too few
// registers to do otherwise, and is quicker so.
#if defined(__AVX512F__)
#define INLINE_IF_THERE_IS_ROOM [[gnu::always_inline]] inline
#else
#define INLINE_IF_THERE_IS_ROOM inline
#endif

using bf16 = uint16_t;

inline float one(bf16 x) {
  uint32_t bits = uint32_t(x) << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
inline bf16 round_one(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if (x != x) return bf16(bits >> 16 | 0x40);
  return bf16((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

#if defined(__AVX512F__)

using F = __m512;
using Halves = __m256i;  // as many bf16 as F has lanes
inline F splat(float x) { return _mm512_set1_ps(x); }
inline F load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, F x) { _mm512_storeu_ps(p, x); }
inline F widen(Halves x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
inline Halves load_halves(const bf16* p) { return _mm256_loadu_si256((const __m256i*)p); }
inline Halves load_halves(const bf16* p, int count) {
  return _mm256_maskz_loadu_epi16(__mmask16((1u << count) - 1), p);
}
inline void store_halves(bf16* p, Halves x) { _mm256_storeu_si256((__m256i*)p, x); }
inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline F maximum(F a, F b) { return _mm512_max_ps(a, b); }  // b where either is NaN
inline F minimum(F a, F b) { return _mm512_min_ps(a, b); }
inline F square_root(F x) { return _mm512_sqrt_ps(x); }
inline F floor_of(F x) { return _mm512_floor_ps(x); }
#if defined(__AVX512BF16__)
inline Halves narrow(F x) { return (Halves)_mm512_cvtneps_pbh(x); }
#else
inline Halves narrow(F x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}
#endif

#elif defined(__AVX2__)

using F = __m256;
using Halves = __m128i;
inline F splat(float x) { return _mm256_set1_ps(x); }
inline F load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, F x) { _mm256_storeu_ps(p, x); }
inline F widen(Halves x) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
}
inline Halves load_halves(const bf16* p) { return _mm_loadu_si128((const __m128i*)p); }
inline Halves load_halves(const bf16* p, int count) {
  alignas(16) bf16 part[8] = {};
  memcpy(part, p, size_t(count) * 2);
  return _mm_load_si128((const __m128i*)part);
}
inline void store_halves(bf16* p, Halves x) { _mm_storeu_si128((__m128i*)p, x); }
inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
inline F maximum(F a, F b) { return _mm256_max_ps(a, b); }
inline F minimum(F a, F b) { return _mm256_min_ps(a, b); }
inline F square_root(F x) { return _mm256_sqrt_ps(x); }
inline F floor_of(F x) { return _mm256_floor_ps(x); }
inline Halves narrow(F x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  rounded = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
}

#else

using F = float __attribute__((vector_size(16)));
using Bits = uint32_t __attribute__((vector_size(16)));
using Halves = uint16_t __attribute__((vector_size(8)));
inline F splat(float x) { return F{x, x, x, x}; }
inline F load(const float* p) {
  F x;
  memcpy(&x, p, sizeof x);
  return x;
}
inline void store(float* p, F x) { memcpy(p, &x, sizeof x); }
inline F widen(Halves x) { return (F)(__builtin_convertvector(x, Bits) << 16); }
inline Halves load_halves(const bf16* p) {
  Halves x;
  memcpy(&x, p, sizeof x);
  return x;
}
inline Halves load_halves(const bf16* p, int count) {
  Halves x = {};
  memcpy(&x, p, size_t(count) * 2);
  return x;
}
inline void store_halves(bf16* p, Halves x) { memcpy(p, &x, sizeof x); }
#if defined(__aarch64__)
inline F fma(F a, F b, F c) { return (F)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
#else
inline F fma(F a, F b, F c) { return a * b + c; }
#endif
inline F maximum(F a, F b) { return a > b ? a : b; }
inline F minimum(F a, F b) { return a < b ? a : b; }
inline F square_root(F x) {
  F r = {};
  for (int i = 0; i < 4; i++) r[i] = sqrtf(x[i]);
  return r;
}
inline F floor_of(F x) {
  using I = int32_t __attribute__((vector_size(16)));
  const F whole = __builtin_convertvector(__builtin_convertvector(x, I), F);
  return whole - (whole > x ? splat(1.f) : splat(0.f));
}
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
inline Halves narrow(F x) { return (Halves)vcvt_bf16_f32((float32x4_t)x); }
#else
inline Halves narrow(F x) {
  const Bits bits = (Bits)x;
  Bits rounded = bits + 0x7fff + (bits >> 16 & 1);
  rounded = (x != x) ? (bits | 0x400000) : rounded;
  return __builtin_convertvector(rounded >> 16, Halves);
}

#endif

#endif

constexpr int kLanes = sizeof(F) / 4;
using Int = int32_t __attribute__((vector_size(sizeof(F))));

inline F load16(const bf16* p) { return widen(load_halves(p)); }
// `count` of them, or all lanes where there are more; the other lanes are zero.
inline F load16(const bf16* p, int count) {
  return count >= kLanes ? load16(p) : widen(load_halves(p, count));
}
inline void store16(bf16* p, F x) { store_halves(p, narrow(x)); }
inline void store16(bf16* p, F x, int count) {
  if (count >= kLanes) return store16(p, x);
  alignas(64) bf16 part[kLanes];
  store16(part, x);
  memcpy(p, part, size_t(count) * 2);
}
inline F rounded(F x) { return widen(narrow(x)); }  // to what bf16 can hold

inline Int lane_index() {
  Int index = {};
  for (int i = 0; i < kLanes; i++) index[i] = i;
  return index;
}
// Ones in the first `count` lanes, zeros in the rest.
inline F first_lanes(int count) { return lane_index() < count ? splat(1.f) : splat(0.f); }

#if defined(__AVX512F__)

// The transpose of kLanes vectors of dwords.
inline void transpose(Int* rows) {
  __m512i* r = (__m512i*)rows;
  __m512i t[16];
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; i++) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
  }
  for (int i = 0; i < 8; i++) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
    r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
  }
}
// What `join` makes of the lanes of each of kLanes vectors, all in the same order.
template <class Join>
INLINE_IF_THERE_IS_ROOM F joined(const F* a, Join join) {
  __m512 t[8], u[4], v[2];
  for (int i = 0; i < 8; i++)
    t[i] = join(_mm512_unpacklo_ps(a[2 * i], a[2 * i + 1]), _mm512_unpackhi_ps(a[2 * i], a[2 * i + 1]));
  const auto low = [](__m512 x, __m512 y) {
    return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(x), _mm512_castps_pd(y)));
  };
  const auto high = [](__m512 x, __m512 y) {
    return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(x), _mm512_castps_pd(y)));
  };
  for (int i = 0; i < 4; i++) u[i] = join(low(t[2 * i], t[2 * i + 1]), high(t[2 * i], t[2 * i + 1]));
  for (int i = 0; i < 2; i++)
    v[i] = join(_mm512_shuffle_f32x4(u[2 * i], u[2 * i + 1], 0x88),
                _mm512_shuffle_f32x4(u[2 * i], u[2 * i + 1], 0xdd));
  return join(_mm512_shuffle_f32x4(v[0], v[1], 0x88), _mm512_shuffle_f32x4(v[0], v[1], 0xdd));
}
inline float sum_lanes(F x) { return _mm512_reduce_add_ps(x); }

#else
#if defined(__AVX2__)

inline void transpose(Int* rows) {
  __m256i* r = (__m256i*)rows;
  __m256i t[8];
  for (int i = 0; i < 4; i++) {
    t[2 * i] = _mm256_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 2; i++) {
    r[4 * i] = _mm256_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm256_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm256_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm256_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm256_permute2x128_si256(r[i], r[4 + i], 0x20);
    t[4 + i] = _mm256_permute2x128_si256(r[i], r[4 + i], 0x31);
  }
  for (int i = 0; i < 8; i++) r[i] = t[i];
}
template <class Join>
INLINE_IF_THERE_IS_ROOM F joined(const F* a, Join join) {
  __m256 t[4], u[2];
  for (int i = 0; i < 4; i++)
    t[i] = join(_mm256_unpacklo_ps(a[2 * i], a[2 * i + 1]), _mm256_unpackhi_ps(a[2 * i], a[2 * i + 1]));
  for (int i = 0; i < 2; i++) {
    const __m256d x = _mm256_castps_pd(t[2 * i]), y = _mm256_castps_pd(t[2 * i + 1]);
    u[i] = join(_mm256_castpd_ps(_mm256_unpacklo_pd(x, y)),
                _mm256_castpd_ps(_mm256_unpackhi_pd(x, y)));
  }
  return join(_mm256_permute2f128_ps(u[0], u[1], 0x20), _mm256_permute2f128_ps(u[0], u[1], 0x31));
}

#else

inline void transpose(Int* r) {
  Int t[4];
  for (int i = 0; i < 4; i++)
    for (int j = 0; j < 4; j++) t[i][j] = r[j][i];
  for (int i = 0; i < 4; i++) r[i] = t[i];
}
template <class Join>
INLINE_IF_THERE_IS_ROOM F joined(const F* a, Join join) {
  Int t[4];
  for (int i = 0; i < 4; i++) t[i] = (Int)a[i];
  transpose(t);
  return join(join((F)t[0], (F)t[2]), join((F)t[1], (F)t[3]));
}

#endif

// The lanes' sum, in a fixed order.
inline float sum_lanes(F x) {
  alignas(64) float lanes[kLanes];
  store(lanes, x);
  for (int half = kLanes / 2; half; half /= 2)
    for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
  return lanes[0];
}

#endif

// The sum of each of kLanes vectors, and the largest lane of each.
INLINE_IF_THERE_IS_ROOM F sums_of(const F* a) {
  return joined(a, [](F x, F y) { return x + y; });
}
INLINE_IF_THERE_IS_ROOM F maxima_of(const F* a) {
  return joined(a, [](F x, F y) { return maximum(x, y); });
}

// 2^x to 2e-7, for x < 128; exactly 1 for 0, zero from -127 on down.
inline F exp2_of(F x) {
  x = maximum(splat(-200.f), x);  // in this order, NaN stays
  const F whole = floor_of(x), f = x - whole;
  F p = splat(0.001867130701f);
  p = fma(p, f, splat(0.009017028962f));
  p = fma(p, f, splat(0.055799914102f));
  p = fma(p, f, splat(0.240164449869f));
  p = fma(p, f, splat(0.69315131183f));
  p = fma(p, f, splat(1.f));
#if defined(__AVX512F__)
  return _mm512_scalef_ps(p, whole);
#else
  const Int exponent = __builtin_convertvector(maximum(whole, splat(-127.f)), Int) + 127;
  return p * (F)(exponent << 23);
#endif
}
inline F exp_of(F x) {
  x = minimum(splat(88.f), x);  // in this order, NaN stays
  return exp2_of(x * splat(1.44269504088896341f));
}
inline F negative(F x) { return (F)((Int)x ^ INT32_MIN); }
inline F magnitude(F x) { return (F)((Int)x & INT32_MAX); }
inline F tanh_of(F x) {  // 1 - 2 / (e^2x + 1)
  return splat(1.f) - splat(2.f) / (exp_of(x + x) + splat(1.f));
}
// The error function to 1.5e-7 (M. Abramowitz and I. Stegun, Handbook of Mathematical Functions,
// 7.1.26).
inline F erf_of(F x) {
  const F a = magnitude(x), t = splat(1.f) / fma(splat(0.3275911f), a, splat(1.f));
  F p = splat(1.061405429f);
  p = fma(p, t, splat(-1.453152027f));
  p = fma(p, t, splat(1.421413741f));
  p = fma(p, t, splat(-0.284496736f));
  p = fma(p, t, splat(0.254829592f));
  const F erf = splat(1.f) - p * t * exp_of(negative(a * a));
  return (F)((Int)erf | ((Int)x & INT32_MIN));
}
