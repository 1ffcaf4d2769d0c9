// Products of bf16 with bf16 by AVX-512's vdpbf16ps: lanes are pairs of columns of the weight.
//
// Invariant: an output is accumulated in the order of its weight's columns, 32 at a time, in the 16
// lanes of one register, which are then summed as a tree; so it does not depend on what is computed
// beside it.
#pragma once
#include "product.h"

struct Pairs {
  using Element = bf16;  // activations are taken as they are
  static constexpr int kStep = 32;

  static void multiply(const Chunk& chunk, int width, const Block<Element>& x, Product& product) {
    for (int g = 0; g < chunk.num_groups; g++)
      multiply(chunk.groups[g], width, x, product.out[0] + g * kGroup);
  }

 private:
  // More columns of 8 rows than that don't stay in the first cache beside four rows of weights: they are
  // read once for two rows then.
  static constexpr int kWide = 1024;

  // What is fetched ahead while a row is read: its successor in the next group.
  struct Rows {
    const bf16* first;
    int64_t step, ahead;  // in elements

    Rows from(int r) const { return {first + r * step, step, ahead}; }
  };

  static void multiply(const Group& group, int width, const Block<Element>& x, float* out) {
    const int64_t stride = group.stride(width), step = group.step * stride;
    const Rows rows{group.bf16_rows(width), step, group.step == 1 ? kGroup * step : stride};
    if (group.count < kGroup) {
      for (int m = 0; m < x.num_rows; m++)
        for (int r = 0; r < group.count; r++)
          dots<1, 1, 0, 0>(rows.from(r), width, x.rows + m, out + m * kOutputs + r);
      return;
    }
    const int fours = x.num_rows / 4 * 4;
    int m = fours;
    for (int r = 0; fours && r < kGroup; r += 4) {
      // Fetching ahead is spread over the passes, for it must not wait for memory.
      float* to = out + r;
      if (fours == 4) {
        dots<4, 4, 0, 4>(rows.from(r), width, x.rows, to);
      } else if (fours == 8 && width > kWide) {
        dots<2, 8, 0, 2>(rows.from(r), width, x.rows, to);
        dots<2, 8, 0, 2>(rows.from(r + 2), width, x.rows, to + 2);
      } else if (fours == 8) {
        dots<4, 4, 0, 2>(rows.from(r), width, x.rows, to);
        dots<4, 4, 2, 4>(rows.from(r), width, x.rows + 4, to + 4 * kOutputs);
      } else {
        dots<4, 4, 0, 2>(rows.from(r), width, x.rows, to);
        dots<4, 4, 2, 3>(rows.from(r), width, x.rows + 4, to + 4 * kOutputs);
        dots<4, 4, 3, 4>(rows.from(r), width, x.rows + 8, to + 8 * kOutputs);
        if (fours == 16) dots<4, 4, 0, 0>(rows.from(r), width, x.rows + 12, to + 12 * kOutputs);
      }
    }
    if (m + 3 == x.num_rows) {
      for (int r = 0; r < kGroup; r += 4) {
        float* to = out + m * kOutputs + r;
        if (fours)
          dots<4, 3, 0, 0>(rows.from(r), width, x.rows + m, to);
        else
          dots<4, 3, 0, 4>(rows.from(r), width, x.rows + m, to);
      }
      return;
    }
    if (m + 2 == x.num_rows) {
      for (int r = 0; r < kGroup; r += 8) {
        float* to = out + m * kOutputs + r;
        if (fours)
          dots<8, 2, 0, 0>(rows.from(r), width, x.rows + m, to);
        else
          dots<8, 2, 0, 8>(rows.from(r), width, x.rows + m, to);
      }
      return;
    }
    if (m + 1 == x.num_rows) {
      float* to = out + m * kOutputs;
      if (m)
        dots<16, 1, 0, 0>(rows, width, x.rows + m, to);
      else
        dots<16, 1, 0, 16>(rows, width, x.rows + m, to);
    }
  }

  // R weight rows with M rows of activations: out[m * kOutputs + r]. Fetches ahead for the rows
  // [kFrom, kTo) of them.
  template <int R, int M, int kFrom, int kTo>
  static void dots(const Rows& weights, int width, const Element* const* x, float* out) {
    F sums[16];
    for (int i = 0; i < 16; i++) sums[i] = splat(0.f);
    const Element* rows[M];
    for (int m = 0; m < M; m++) rows[m] = x[m];
    int k = 0;
    for (; k + kStep <= width; k += kStep) {
      __m512bh inputs[M];
      for (int m = 0; m < M; m++) inputs[m] = (__m512bh)_mm512_loadu_si512(rows[m] + k);
      for (int r = 0; r < R; r++) {
        const bf16* at = weights.first + r * weights.step + k;
        const __m512bh w = (__m512bh)_mm512_loadu_si512(at);
        if (r >= kFrom && r < kTo) prefetch(at + weights.ahead);
        for (int m = 0; m < M; m++)
          sums[m * R + r] = _mm512_dpbf16_ps(sums[m * R + r], w, inputs[m]);
      }
    }
    if (k < width) {
      const __mmask32 there = (__mmask32(1) << (width - k)) - 1;
      for (int m = 0; m < M; m++) {
        const __m512bh input = (__m512bh)_mm512_loadu_si512(rows[m] + k);
        for (int r = 0; r < R; r++) {
          const bf16* at = weights.first + r * weights.step + k;
          const __m512bh w = (__m512bh)_mm512_maskz_loadu_epi16(there, at);
          sums[m * R + r] = _mm512_dpbf16_ps(sums[m * R + r], w, input);
        }
      }
    }
    alignas(64) float all[16];
    _mm512_store_ps(all, sums_of(sums));
    for (int m = 0; m < M; m++) memcpy(out + m * kOutputs, all + m * R, R * sizeof(float));
  }
};
