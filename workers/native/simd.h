// bf16 and vector arithmetic that the kernels share.
//
// Activations of a block of 16 rows lie "paired": dword [k / 2][row] holds elements k and k + 1 of
// that row. It is the layout that AMX wants of its second operand, and one in which 16 rows take part
// in every vector operation. Invariant: nothing here mixes two rows.
#pragma once
#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

using bf16 = uint16_t;

constexpr int kRows = 16;  // of a block of activations, and of a tile

inline __m512 low_half(__m512i pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
inline __m512 high_half(__m512i pairs) {
  return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(int(0xffff0000u))));
}
inline __m512 widen(__m256i x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
inline __m512 load16(const bf16* p) { return widen(_mm256_loadu_si256((const __m256i*)p)); }
inline __m256i narrow(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }
inline void store16(bf16* p, __m512 x) { _mm256_storeu_si256((__m256i*)p, narrow(x)); }
inline __m512 rounded(__m512 x) { return widen(narrow(x)); }  // to what bf16 can hold
inline float one(bf16 x) {
  uint32_t bits = uint32_t(x) << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

inline __m512i interleave_index() {
  alignas(64) static constexpr uint16_t index[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                     21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                     11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_load_si512(index);
}

inline __m512i lane_index() {
  return _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
}
// Of the elements of one column in a row-major matrix of 16 columns.
inline __m512i column_index() { return _mm512_slli_epi32(lane_index(), 4); }

// Round both to bf16, `low` into the lower halves of the dwords.
inline __m512i join(__m512 low, __m512 high) {
  return _mm512_permutexvar_epi16(interleave_index(), (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

// 2^x to 2e-7, for x < 128; exactly 1 for 0, zero far below.
inline __m512 exp2_ps(__m512 x) {
  const __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF);  // x - floor(x)
  __m512 p = _mm512_set1_ps(0.001867130701f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.009017028962f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.055799914102f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.240164449869f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.69315131183f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.f));
  return _mm512_scalef_ps(p, x);  // which takes floor(x)
}
inline __m512 exp_ps(__m512 x) {
  x = _mm512_min_ps(_mm512_set1_ps(88.f), x);  // in this order, NaN stays
  return exp2_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f)));
}
// 1 / x to about 1e-7: half the time of a division.
inline __m512 reciprocal(__m512 x) {
  const __m512 r = _mm512_rcp14_ps(x);
  return _mm512_mul_ps(r, _mm512_fnmadd_ps(x, r, _mm512_set1_ps(2.f)));
}
inline __m512 tanh_ps(__m512 x) {  // 1 - 2 / (e^2x + 1)
  const __m512 e = exp_ps(_mm512_add_ps(x, x));
  const __m512 one_ = _mm512_set1_ps(1.f);
  return _mm512_fnmadd_ps(_mm512_set1_ps(2.f), reciprocal(_mm512_add_ps(e, one_)), one_);
}
inline __m512 silu_ps(__m512 x) {
  const __m512 e = exp_ps(_mm512_sub_ps(_mm512_setzero_ps(), x));
  return _mm512_mul_ps(x, reciprocal(_mm512_add_ps(_mm512_set1_ps(1.f), e)));
}
inline __m512 gelu_tanh_ps(__m512 x) {
  const __m512 cube = _mm512_mul_ps(_mm512_mul_ps(x, x), x);
  const __m512 inner = _mm512_mul_ps(_mm512_set1_ps(0.7978845608028654f),
                                     _mm512_fmadd_ps(_mm512_set1_ps(0.044715f), cube, x));
  const __m512 half = _mm512_mul_ps(_mm512_set1_ps(0.5f), x);
  return _mm512_mul_ps(half, _mm512_add_ps(_mm512_set1_ps(1.f), tanh_ps(inner)));
}

// The transpose of a 16 x 16 matrix of dwords.
inline void transpose16(__m512i r[16]) {
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

// Up to 16 rows of `width` elements (a multiple of 32) into the paired layout; a null row is zeros.
inline void pair_rows(const bf16* const rows[kRows], int width, bf16* paired) {
  for (int k = 0; k < width; k += 32) {
    __m512i r[16];
    for (int m = 0; m < kRows; m++)
      r[m] = rows[m] ? _mm512_loadu_si512(rows[m] + k) : _mm512_setzero_si512();
    transpose16(r);
    for (int i = 0; i < 16; i++) _mm512_store_si512(paired + (k / 2 + i) * 32, r[i]);
  }
}

// Root mean square norm (transformers' LlamaRMSNorm, or Gemma's with `plus_one`).
struct Norm {
  const bf16* weight;
  float eps;
  int plus_one;
};

inline __m512 inverse_rms(__m512 sum_of_squares, int width, float eps) {
  const __m512 mean = _mm512_div_ps(sum_of_squares, _mm512_set1_ps(float(width)));
  return _mm512_div_ps(_mm512_set1_ps(1.f),
                       _mm512_sqrt_ps(_mm512_add_ps(mean, _mm512_set1_ps(eps))));
}

inline __m512 normed(__m512 x, __m512 inverse, __m512 weight, bool plus_one) {
  x = _mm512_mul_ps(x, inverse);
  if (plus_one) return _mm512_mul_ps(x, _mm512_add_ps(_mm512_set1_ps(1.f), weight));
  return _mm512_mul_ps(weight, rounded(x));
}

inline __m512i weight_pair(const bf16* weight) {
  int32_t pair;
  memcpy(&pair, weight, 4);
  return _mm512_set1_epi32(pair);
}

inline __m512 sum_of_squares(const bf16* paired, int width) {
  __m512 sums[4] = {};
  for (int k = 0; k < width; k += 4)
    for (int i = 0; i < 2; i++) {
      const __m512i x = _mm512_load_si512(paired + (k + 2 * i) * kRows);
      sums[2 * i] = _mm512_fmadd_ps(low_half(x), low_half(x), sums[2 * i]);
      sums[2 * i + 1] = _mm512_fmadd_ps(high_half(x), high_half(x), sums[2 * i + 1]);
    }
  return _mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3]));
}

// out = norm(x) of a paired block; may be in place.
inline void norm_block(const bf16* x, int width, const Norm& norm, bf16* out) {
  const __m512 inverse = inverse_rms(sum_of_squares(x, width), width, norm.eps);
  for (int k = 0; k < width; k += 2) {
    const __m512i pair = _mm512_load_si512(x + k * kRows), w = weight_pair(norm.weight + k);
    const __m512 low = normed(low_half(pair), inverse, low_half(w), norm.plus_one);
    const __m512 high = normed(high_half(pair), inverse, high_half(w), norm.plus_one);
    _mm512_store_si512(out + k * kRows, join(low, high));
  }
}

// x += y, or x += norm(y) where a model norms what a sublayer gives.
inline void add_block(bf16* x, const bf16* y, int width, const Norm& norm) {
  const bool norms = norm.weight != nullptr;
  __m512 inverse = _mm512_setzero_ps();
  if (norms) inverse = inverse_rms(sum_of_squares(y, width), width, norm.eps);
  for (int k = 0; k < width; k += 2) {
    const __m512i a = _mm512_load_si512(x + k * kRows), b = _mm512_load_si512(y + k * kRows);
    __m512 low = low_half(b), high = high_half(b);
    if (norms) {
      const __m512i w = weight_pair(norm.weight + k);
      low = rounded(normed(low, inverse, low_half(w), norm.plus_one));
      high = rounded(normed(high, inverse, high_half(w), norm.plus_one));
    }
    low = _mm512_add_ps(low_half(a), low);
    high = _mm512_add_ps(high_half(a), high);
    _mm512_store_si512(x + k * kRows, join(low, high));
  }
}

// The norm of one row (a head), in place.
inline void norm_row(bf16* x, int width, const Norm& norm) {
  __m512 sum = _mm512_setzero_ps();
  for (int k = 0; k < width; k += 16) sum = _mm512_fmadd_ps(load16(x + k), load16(x + k), sum);
  const __m512 inverse =
      inverse_rms(_mm512_set1_ps(_mm512_reduce_add_ps(sum)), width, norm.eps);
  for (int k = 0; k < width; k += 16)
    store16(x + k, normed(load16(x + k), inverse, load16(norm.weight + k), norm.plus_one));
}

// Rotate the first `width` elements of a head, in place; `cos` and `sin` hold width / 2 values.
inline void rotate(bf16* x, int width, const bf16* cos, const bf16* sin) {
  const int half = width / 2;
  for (int k = 0; k < half; k += 16) {
    const __m512 a = load16(x + k), b = load16(x + half + k);
    const __m512 c = load16(cos + k), s = load16(sin + k);
    store16(x + k, _mm512_sub_ps(rounded(_mm512_mul_ps(a, c)), rounded(_mm512_mul_ps(b, s))));
    store16(x + half + k,
            _mm512_add_ps(rounded(_mm512_mul_ps(b, c)), rounded(_mm512_mul_ps(a, s))));
  }
}
