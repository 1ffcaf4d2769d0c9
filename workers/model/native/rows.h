// Operations on rows of activations: norms, sums, rotations, activations.
//
// A row is bf16, `width` elements and zeros up to the next multiple of kPad. Invariants: the zeros
// stay zeros; a row's result depends on that row alone. Each operation rounds where transformers'
// modules of the family do.
#pragma once
#include "vector.h"

constexpr int kPad = 32;
constexpr int padded(int width) { return (width + kPad - 1) / kPad * kPad; }

enum NormKind : int32_t {
  kNoNorm = 0,
  kRms = 1,          // w * bf16(x / rms), as LlamaRMSNorm
  kRmsPlusOne = 2,   // (1 + w) * (x / rms), as Gemma3RMSNorm
  kRmsUnrounded = 3, // w * (x / rms), as Olmo2RMSNorm
  kLayerNorm = 4,    // w * (x - mean) / deviation + b
};

struct Norm {
  const bf16* weight;  // null: ones
  const bf16* bias;    // null: zeros
  float eps;
  int32_t kind;
};

inline float sum_of_squares(const bf16* x, int width) {
  F sums[2] = {splat(0.f), splat(0.f)};
  for (int k = 0; k < padded(width); k += 2 * kLanes)
    for (int i = 0; i < 2; i++) {
      const F value = load16(x + k + i * kLanes);
      sums[i] = fma(value, value, sums[i]);
    }
  return sum_lanes(sums[0] + sums[1]);
}

inline float mean_of(const bf16* x, int width) {
  F sum = splat(0.f);
  for (int k = 0; k < padded(width); k += kLanes) sum = sum + load16(x + k);
  return sum_lanes(sum) / float(width);
}

inline float variance_of(const bf16* x, int width, float mean) {
  F sum = splat(0.f);
  for (int k = 0; k < width; k += kLanes) {
    const F off = (load16(x + k) - splat(mean)) * first_lanes(width - k);
    sum = fma(off, off, sum);
  }
  return sum_lanes(sum) / float(width);
}

// out(k, value) for each vector of norm(x), in fp32.
template <class Out>
inline void norm_row(const bf16* x, int width, const Norm& norm, Out out) {
  const bool centers = norm.kind == kLayerNorm;
  const float mean = centers ? mean_of(x, width) : 0.f;
  const float square = centers ? variance_of(x, width, mean) : sum_of_squares(x, width) / float(width);
  const F inverse = splat(1.f / sqrtf(square + norm.eps)), center = splat(mean);
  for (int k = 0; k < width; k += kLanes) {
    const F weight = norm.weight ? load16(norm.weight + k, width - k) : first_lanes(width - k);
    F value = load16(x + k);
    if (centers) {
      value = (value - center) * inverse * weight;
      if (norm.bias) value = value + load16(norm.bias + k, width - k);
    } else {
      value = value * inverse;
      if (norm.kind == kRmsPlusOne)
        value = value * (splat(1.f) + weight);
      else
        value = weight * (norm.kind == kRms ? rounded(value) : value);
    }
    out(k, value);
  }
}

// out = norm(x); may be in place.
inline void norm_into(const bf16* x, int width, const Norm& norm, bf16* out) {
  norm_row(x, width, norm, [&](int k, F value) { store16(out + k, value); });
}

// The same in place, of what has no zeros behind it. `row` holds padded(width) elements.
inline void norm_apart(bf16* x, int width, const Norm& norm, bf16* row) {
  memset(row + width, 0, size_t(padded(width) - width) * 2);
  memcpy(row, x, size_t(width) * 2);
  norm_into(row, width, norm, row);
  memcpy(x, row, size_t(width) * 2);
}

// x += y * scale, or x += norm(y) * scale where a model norms what a sublayer gives.
inline void add_into(bf16* x, const bf16* y, int width, const Norm& norm, float scale) {
  const auto add = [&](int k, F value) {
    if (scale != 1.f) value = rounded(rounded(value) * splat(scale));
    store16(x + k, load16(x + k) + rounded(value));
  };
  if (norm.kind != kNoNorm) return norm_row(y, width, norm, add);
  for (int k = 0; k < width; k += kLanes) add(k, load16(y + k));
}

enum RotationKind : int32_t {
  kHalves = 0,           // elements i and i + half turn together, products rounded
  kHalvesUnrounded = 1,  // the same, in fp32 until the end
  kPairsUnrounded = 2,   // elements 2 i and 2 i + 1, in fp32 until the end
};

// Rotate the first `width` elements of a head, in place; `cos` and `sin` hold width / 2 values, and
// may be read up to a vector further.
inline void rotate(bf16* x, int width, const float* cos, const float* sin, int kind) {
  const int half = width / 2;
  if (kind == kPairsUnrounded) {
    for (int i = 0; i < half; i++) {
      const float a = one(x[2 * i]), b = one(x[2 * i + 1]);
      x[2 * i] = round_one(a * cos[i] - b * sin[i]);
      x[2 * i + 1] = round_one(b * cos[i] + a * sin[i]);
    }
    return;
  }
  const auto as = [&](F product) { return kind == kHalves ? rounded(product) : product; };
  for (int k = 0; k < half; k += kLanes) {
    const int count = half - k;
    const F a = load16(x + k, count), b = load16(x + half + k, count);
    const F c = load(cos + k), s = load(sin + k);
    store16(x + k, as(a * c) - as(b * s), count);
    store16(x + half + k, as(b * c) + as(a * s), count);
  }
}

enum Activation : int32_t { kSilu = 0, kGeluTanh = 1, kGelu = 2, kRelu = 3, kReluSquared = 4 };

template <int kind>
inline F activate(F x) {
  if constexpr (kind == kSilu) return x / (splat(1.f) + exp_of(negative(x)));
  if constexpr (kind == kGeluTanh) {
    const F inner = splat(0.7978845608028654f) * fma(splat(0.044715f), x * x * x, x);
    return splat(0.5f) * x * (splat(1.f) + tanh_of(inner));
  }
  if constexpr (kind == kGelu)
    return splat(0.5f) * x * (splat(1.f) + erf_of(x * splat(0.7071067811865476f)));
  const F positive = maximum(x, splat(0.f));
  if constexpr (kind == kReluSquared) return positive * positive;
  return positive;
}

// call(activation) with `kind` as a constant.
template <class Call>
inline void with_activation(int kind, Call call) {
  switch (kind) {
    case kSilu: return call([](F x) { return activate<kSilu>(x); });
    case kGeluTanh: return call([](F x) { return activate<kGeluTanh>(x); });
    case kGelu: return call([](F x) { return activate<kGelu>(x); });
    case kRelu: return call([](F x) { return activate<kRelu>(x); });
    default: return call([](F x) { return activate<kReluSquared>(x); });
  }
}
