// Products of bf16 with bf16 by aarch64's bfmmla: of two rows with two, four columns at a time.
//
// Invariant: an output is accumulated in the order of its weight's columns, in one lane; so it does
// not depend on what is computed beside it, not even in the same square.
#pragma once
#include "product.h"

struct Squares {
  using Element = bf16;  // activations are taken as they are
  static constexpr int kStep = 8;

  // A row that is not there is the last one again: what it gives is read by nobody.
  static void multiply(const Chunk& chunk, int width, const Block<Element>& x, Product& product) {
    const bf16* rows[kRows];
    for (int m = 0; m < kRows; m++) rows[m] = x.rows[m < x.num_rows ? m : x.num_rows - 1];
    for (int g = 0; g < chunk.num_groups; g++)
      multiply(chunk.groups[g], width, rows, x.num_rows, product.out[0] + g * kGroup);
  }

 private:
  static void multiply(const Group& group, int width, const bf16* const* rows, int num_rows,
                       float* out) {
    const int64_t stride = group.stride(width), step = group.step * stride;
    const int64_t ahead = group.step == 1 ? kGroup * step : stride;
    const bf16* weights[kGroup];
    for (int r = 0; r < kGroup; r++)
      weights[r] = group.bf16_rows(width) + (r < group.count ? r : group.count - 1) * step;
    for (int m = 0; m < num_rows;) {
      const int left = num_rows - m;
      const bf16* const* some = rows + m;
      float* to = out + m * kOutputs;
      if (left > 4) {
        of_all<4, 4>(weights, ahead, width, some, to);
        m += 8;
      } else if (left > 2) {
        of_all<4, 2>(weights, ahead, width, some, to);
        m += 4;
      } else {
        of_all<8, 1>(weights, ahead, width, some, to);
        m += 2;
      }
    }
  }

  template <int R, int M>
  static void of_all(const bf16* const* weights, int64_t ahead, int width,
                     const bf16* const* x, float* out) {
    for (int r = 0; r < kGroup; r += 2 * R)
      squares<R, M>(weights + r, ahead, width, x, out + r);
  }

  // Eight columns of two rows, as two operands of four columns each.
  static void load_two(const bf16* first, const bf16* second, bfloat16x8_t to[2]) {
    const uint64x2_t a = vreinterpretq_u64_u16(vld1q_u16(first));
    const uint64x2_t b = vreinterpretq_u64_u16(vld1q_u16(second));
    to[0] = vreinterpretq_bf16_u64(vzip1q_u64(a, b));
    to[1] = vreinterpretq_bf16_u64(vzip2q_u64(a, b));
  }

  // R pairs of weight rows with M pairs of rows of activations: out[m * kOutputs + r].
  template <int R, int M>
  static void squares(const bf16* const* weights, int64_t ahead, int width, const bf16* const* x,
                      float* out) {
    float32x4_t sums[R][M];
    for (int r = 0; r < R; r++)
      for (int m = 0; m < M; m++) sums[r][m] = vdupq_n_f32(0.f);
    const auto add = [&](int r, const bf16* first, const bf16* second, bfloat16x8_t inputs[M][2]) {
      bfloat16x8_t w[2];
      load_two(first, second, w);
      for (int half = 0; half < 2; half++)
        for (int m = 0; m < M; m++) sums[r][m] = vbfmmlaq_f32(sums[r][m], w[half], inputs[m][half]);
    };
    int k = 0;
    bfloat16x8_t inputs[M][2];
    for (; k + kStep <= width; k += kStep) {
      for (int m = 0; m < M; m++) load_two(x[2 * m] + k, x[2 * m + 1] + k, inputs[m]);
      for (int r = 0; r < R; r++) {
        const bf16 *first = weights[2 * r] + k, *second = weights[2 * r + 1] + k;
        if (k % 32 == 0) {
          prefetch(first + ahead);
          prefetch(second + ahead);
        }
        add(r, first, second, inputs);
      }
    }
    if (k < width) {
      for (int m = 0; m < M; m++) load_two(x[2 * m] + k, x[2 * m + 1] + k, inputs[m]);
      for (int r = 0; r < R; r++) {
        bf16 rest[2][kStep] = {};
        for (int i = 0; i < 2; i++)
          memcpy(rest[i], weights[2 * r + i] + k, size_t(width - k) * 2);
        add(r, rest[0], rest[1], inputs);
      }
    }
    for (int r = 0; r < R; r++)
      for (int m = 0; m < M; m++) {
        float square[4];
        vst1q_f32(square, sums[r][m]);
        float* to = out + 2 * m * kOutputs + 2 * r;
        to[0] = square[0];
        to[1] = square[2];
        to[kOutputs] = square[1];
        to[kOutputs + 1] = square[3];
      }
  }
};
