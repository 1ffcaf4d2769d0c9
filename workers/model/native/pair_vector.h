// Vectors of pairs of bf16, and the instruction that adds both products of a pair to a lane of fp32.
//
// As many pairs as F has lanes. Only sets that have the instruction include this.
#pragma once
#include "vector.h"

#if defined(__AVX512BF16__)

using PairVector = __m512bh;
inline PairVector load_pairs(const bf16* p) { return (PairVector)_mm512_loadu_si512(p); }
// `count` of them, or all where there are more; the others are zero.
inline PairVector load_pairs(const bf16* p, int count) {
  const __mmask16 there = count >= 16 ? __mmask16(~0u) : __mmask16((1u << count) - 1);
  return (PairVector)_mm512_maskz_loadu_epi32(there, p);
}
inline PairVector splat_pair(const bf16* p) {
  int32_t pair;
  memcpy(&pair, p, 4);
  return (PairVector)_mm512_set1_epi32(pair);
}
inline F add_products(F sum, PairVector a, PairVector b) { return _mm512_dpbf16_ps(sum, a, b); }

#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)

using PairVector = bfloat16x8_t;
inline PairVector load_pairs(const bf16* p) {
  return vreinterpretq_bf16_u16(vld1q_u16(p));
}
inline PairVector load_pairs(const bf16* p, int count) {
  if (count >= kLanes) return load_pairs(p);
  bf16 part[2 * kLanes] = {};
  memcpy(part, p, size_t(count) * 4);
  return load_pairs(part);
}
inline PairVector splat_pair(const bf16* p) {
  uint32_t pair;
  memcpy(&pair, p, 4);
  return vreinterpretq_bf16_u32(vdupq_n_u32(pair));
}
inline F add_products(F sum, PairVector a, PairVector b) {
  return (F)vbfdotq_f32((float32x4_t)sum, a, b);
}

#endif
