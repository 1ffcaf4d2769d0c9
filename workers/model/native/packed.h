// Weights of 8 or 4 bits, and products with them.
//
// A packed matrix lies in strips of 16 rows, and a strip in tiles of `group` columns. A tile is
//
//   integers  lines of 64 bytes, [16 rows][4 columns], of 8 bits; of 4 bits a line's low halves are
//             4 columns, its high halves those 16 columns further on
//   scales    [16], fp16 or fp32
//   minima    [16], likewise, where the format has them
//
// A weight is scale * integer + minimum or, without minima, scale * (integer - 2^(bits - 1)). Rows
// behind the matrix's last are zeros. Integers beside minima are less than 128. A matrix may be some
// tiles of each strip of a wider one, whose width is its `stride`, or columns of one tile, behind
// those that are `skipped`.
//
// Activations are rounded to 8 bits, each 32 of a row with a scale of their own. Products of integers
// are summed exactly, so an output depends on its own row alone, and what is computed beside it
// changes nothing: tiles are added up in the order of their columns, in fp32, each output in a lane
// of its own.
#pragma once
#include "product.h"

struct PackedFormat {
  int bits, group;
  bool wide, minima;  // scales of fp32; there are minima

  explicit PackedFormat(int32_t format)
      : bits(format & 15), group(format >> 8), wide(format & 16), minima(format & 32) {}

  int integer_bytes() const { return group * kGroup * bits / 8; }
  int scale_bytes() const { return kGroup * (wide ? 4 : 2); }
  int tile_bytes() const { return integer_bytes() + scale_bytes() * (minima ? 2 : 1); }
  int64_t strip_bytes(int width) const { return int64_t(width / group) * tile_bytes(); }
};

inline bool is_packed(const Matrix& matrix) { return matrix.format != kBf16; }

inline bool any_packed(const Linear& linear) {
  for (int i = 0; i < linear.num_matrices; i++)
    if (is_packed(linear.matrices[i])) return true;
  return false;
}

// fp16's value, of which no instruction is there.
inline float half_of(uint16_t bits) {
  const uint32_t sign = uint32_t(bits & 0x8000) << 16, magnitude = bits & 0x7fff;
  uint32_t wide;
  float value;
  if (magnitude >= 0x7c00) {
    wide = sign | 0x7f800000 | (magnitude & 0x3ff) << 13;
  } else if (magnitude >= 0x400) {
    wide = sign | ((magnitude << 13) + 0x38000000);
  } else {
    value = float(magnitude) * 0x1p-24f;
    memcpy(&wide, &value, 4);
    wide |= sign;
  }
  memcpy(&value, &wide, 4);
  return value;
}

// kLanes scales.
template <bool kWide>
inline F scales_at(const uint8_t* p) {
  if constexpr (kWide) return load((const float*)p);
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
  return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  F x = {};
  for (int i = 0; i < kLanes; i++) {
    uint16_t bits;
    memcpy(&bits, p + 2 * i, 2);
    x[i] = half_of(bits);
  }
  return x;
#endif
}

// The value of one weight.
inline float packed_at(const Matrix& matrix, int width, int64_t row, int column) {
  const PackedFormat format(matrix.format);
  const int stride = matrix.stride ? matrix.stride : width;
  const uint8_t* tile = (const uint8_t*)matrix.weight + row / kGroup * format.strip_bytes(stride) +
                        int64_t(column / format.group) * format.tile_bytes();
  const int lane = int(row % kGroup);
  column = column % format.group + matrix.skipped;
  int integer;
  if (format.bits == 8) {
    integer = tile[column / 4 * 64 + lane * 4 + column % 4];
  } else {
    const int part = column / 32 * 256, in = column % 32;
    const uint8_t both = tile[part + in % 16 / 4 * 64 + lane * 4 + in % 4];
    integer = in < 16 ? both & 15 : both >> 4;
  }
  const auto number = [&](const uint8_t* p) {
    if (format.wide) {
      float value;
      memcpy(&value, p + 4 * lane, 4);
      return value;
    }
    uint16_t bits;
    memcpy(&bits, p + 2 * lane, 2);
    return half_of(bits);
  };
  const uint8_t* scales = tile + format.integer_bytes();
  const float scale = number(scales);
  if (!format.minima) return scale * float(integer - (1 << (format.bits - 1)));
  return scale * float(integer) + number(scales + format.scale_bytes());
}

// A row of the matrix, rounded to bf16.
inline void unpack_row(const Matrix& matrix, int width, int64_t row, bf16* to) {
  for (int k = 0; k < width; k++) to[k] = round_one(packed_at(matrix, width, row, k));
}

// --- activations

constexpr int kShare = 32;  // elements with one scale

// A row in 8 bits. One behind the other in memory: integers, then for each 32 of them the scale, the
// scale times their sum, and the sum; then for each 16 of them the sum.
struct Shortened {
  const int8_t* integers;
  const float *scales, *scaled_sums;
  const int32_t *sums, *half_sums;

  Shortened() = default;
  Shortened(const void* at, int width) {
    const int shares = padded(width) / kShare;
    integers = (const int8_t*)at;
    scales = (const float*)(integers + padded(width));
    scaled_sums = scales + shares;
    sums = (const int32_t*)(scaled_sums + shares);
    half_sums = sums + shares;
  }
  static int64_t bytes(int width) {
    return (int64_t(padded(width)) + padded(width) / kShare * 5 * 4 + 63) / 64 * 64;
  }
};

// The largest lane.
inline int32_t most_of(Int x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_epi32((__m512i)x);
#else
  int32_t most = x[0];
  for (int i = 1; i < kLanes; i++) most = x[i] > most ? x[i] : most;
  return most;
#endif
}

inline void shorten(const bf16* row, int width, void* at) {
  using Bytes = int8_t __attribute__((vector_size(kLanes)));
  constexpr int kVectors = kShare / kLanes;
  int8_t* integers = (int8_t*)at;
  const int shares = padded(width) / kShare;
  float *scales = (float*)(integers + padded(width)), *scaled_sums = scales + shares;
  int32_t *sums = (int32_t*)(scaled_sums + shares), *half_sums = sums + shares;
  for (int share = 0; share < shares; share++) {
    F x[kVectors];
    // As integers bits are in the order of magnitudes, and what is no number is the largest.
    Int largest = {};
    for (int i = 0; i < kVectors; i++) {
      x[i] = load16(row + share * kShare + i * kLanes);
      const Int bits = (Int)magnitude(x[i]);
      largest = bits > largest ? bits : largest;
    }
    const int32_t bits = most_of(largest);
    float most;
    memcpy(&most, &bits, 4);
    const float scale = most / 127.f;
    const bool usable = bits < 0x7f800000 && scale > 0;
    const F inverse = splat(usable ? 127.f / most : 0.f);
    int32_t sum[2] = {0, 0};
    for (int i = 0; i < kVectors; i++) {
      Int part = {};
      if (usable) {
        // 1.5 * 2^23 more has no room for a fraction: the sum is rounded to even.
        part = (Int)(x[i] * inverse + splat(12582912.f)) - 0x4b400000;
      }
      const Bytes bytes = __builtin_convertvector(part, Bytes);
      memcpy(integers + share * kShare + i * kLanes, &bytes, sizeof bytes);
      sum[i * kLanes / (kShare / 2)] += int32_t(sum_lanes(__builtin_convertvector(part, F)));
    }
    scales[share] = usable || bits == 0 ? scale : most - most;
    scaled_sums[share] = scales[share] * float(sum[0] + sum[1]);
    sums[share] = sum[0] + sum[1];
    half_sums[2 * share] = sum[0];
    half_sums[2 * share + 1] = sum[1];
  }
}

// --- products

// Up to 16 rows.
struct ShortBlock {
  Shortened rows[kRows];
  int num_rows;
};

#if defined(__AVX512VNNI__)
constexpr bool kTakesUnsigned = true;  // of 8 bits
#else
constexpr bool kTakesUnsigned = false;
#endif

// A line's part for kLanes rows: of each 4 integers, as bytes.
#if defined(__AVX512F__)
using Line = __m512i;
inline Line line_at(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline Line low_of(Line x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
inline Line high_of(Line x) { return low_of(_mm512_srli_epi16(x, 4)); }
#elif defined(__AVX2__)
using Line = __m256i;
inline Line line_at(const uint8_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
inline Line low_of(Line x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
inline Line high_of(Line x) { return low_of(_mm256_srli_epi16(x, 4)); }
#else
using Line = uint8_t __attribute__((vector_size(16)));
inline Line line_at(const uint8_t* p) {
  Line x;
  memcpy(&x, p, sizeof x);
  return x;
}
inline Line low_of(Line x) { return x & 15; }
inline Line high_of(Line x) { return x >> 4; }
#endif

// sum[lane] += the products of the lane's 4 integers with the 4 at x. Signed: the line's are, and
// any; else they are less than 128, but for kTakesUnsigned.
template <bool kSigned>
inline Int add_products(Int sum, Line w, const int8_t* x) {
  int32_t four;
  memcpy(&four, x, 4);
#if defined(__AVX512VNNI__)
  return (Int)_mm512_dpbusd_epi32((__m512i)sum, w, _mm512_set1_epi32(four));
#elif defined(__AVX512F__)
  __m512i inputs = _mm512_set1_epi32(four);
  if (kSigned) {
    inputs = _mm512_mask_sub_epi8(inputs, _mm512_movepi8_mask(w), _mm512_setzero_si512(), inputs);
    w = _mm512_abs_epi8(w);
  }
  const __m512i pairs = _mm512_maddubs_epi16(w, inputs);
  return sum + (Int)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
#elif defined(__AVX2__)
  __m256i inputs = _mm256_set1_epi32(four);
  if (kSigned) {
    inputs = _mm256_sign_epi8(inputs, w);
    w = _mm256_abs_epi8(w);
  }
  const __m256i pairs = _mm256_maddubs_epi16(w, inputs);
  return sum + (Int)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
  for (int lane = 0; lane < kLanes; lane++)
    for (int i = 0; i < 4; i++) {
      const int weight = kSigned ? int(int8_t(w[4 * lane + i])) : int(w[4 * lane + i]);
      sum[lane] += weight * x[i];
    }
  return sum;
#endif
}

inline Line signed_of(Line x) {
#if defined(__AVX512F__)
  return _mm512_xor_si512(x, _mm512_set1_epi8(char(0x80)));
#elif defined(__AVX2__)
  return _mm256_xor_si256(x, _mm256_set1_epi8(char(0x80)));
#else
  return x ^ 0x80;
#endif
}

inline F as_floats(Int x) { return __builtin_convertvector(x, F); }
inline Int splat_integer(int32_t x) { return Int{} + x; }

struct Packed {
  static void multiply(const Group& group, int width, const ShortBlock& x, float* out) {
    const PackedFormat format(group.matrix->format);
    const uint8_t* strip = (const uint8_t*)group.matrix->weight +
                           group.row / kGroup * format.strip_bytes(int(group.stride(width)));
    const Place at{strip, width, group.matrix->skipped * kGroup * format.bits / 8};
    if (format.bits == 4)
      with_scales<4>(format, at, x, out);
    else
      with_scales<8>(format, at, x, out);
  }

 private:
  // Of a strip: its first tile, how many columns, and the bytes of those that are skipped.
  struct Place {
    const uint8_t* tile;
    int width, skipped_bytes;
  };

  template <int kBits>
  static void with_scales(const PackedFormat& format, const Place& at, const ShortBlock& x,
                          float* out) {
    if (format.wide)
      return format.minima ? all<kBits, true, true>(format, at, x, out)
                           : all<kBits, true, false>(format, at, x, out);
    return format.minima ? all<kBits, false, true>(format, at, x, out)
                         : all<kBits, false, false>(format, at, x, out);
  }
  template <int kBits, bool kWide, bool kMinima>
  static void all(const PackedFormat& format, const Place& at, const ShortBlock& x, float* out) {
    int m = 0;
    const auto some = [&](auto count, bool fetches) {
      constexpr int M = decltype(count)::value;
      for (int lane = 0; lane < kGroup; lane += kLanes)
        product<kBits, kWide, kMinima, M>(format, at, x.rows + m, lane, fetches && lane == 0,
                                          out + m * kOutputs + lane);
      m += M;
    };
    // Those beside whom memory is fetched come first.
    while (x.num_rows - m >= 8) some(Count<8>{}, m == 0);
    if (x.num_rows - m >= 4) some(Count<4>{}, m == 0);
    if (x.num_rows - m >= 2) some(Count<2>{}, m == 0);
    if (x.num_rows - m >= 1) some(Count<1>{}, m == 0);
  }
  template <int N>
  struct Count {
    static constexpr int value = N;
  };

  // Bytes. Further ahead a line has left the cache again before it is used, or nearly so.
  static constexpr int kAhead = 512;

  // kLanes rows of a strip, from `lane` on, with M rows of activations: out[m * kOutputs].
  template <int kBits, bool kWide, bool kMinima, int M>
  static void product(const PackedFormat& format, const Place& place, const Shortened* x, int lane,
                      bool fetches, float* out) {
    const int width = place.width;
    const uint8_t* tile = place.tile;
    constexpr bool kSigned = kBits == 8 && !kMinima && !kTakesUnsigned;
    constexpr bool kCentered = !kMinima && !kSigned;  // what is subtracted, is so from sums
    constexpr int kShift = kBits - 1;
    const int scales_from = format.integer_bytes(), minima_from = scales_from + format.scale_bytes();
    const int tile_bytes = format.tile_bytes();
    const int lines_from = lane * 4, scale_from = lane * (kWide ? 4 : 2);
    F totals[M];
    for (int m = 0; m < M; m++) totals[m] = splat(0.f);
    if (kBits == 8 && format.group == kShare / 2) {
      for (int half = 0; half < width / (kShare / 2); half++, tile += tile_bytes) {
        Int sums[M];
        for (int m = 0; m < M; m++)
          sums[m] = kCentered ? splat_integer(-(x[m].half_sums[half] << kShift)) : Int{};
        for (int line = 0; line < 4; line++) {
          const uint8_t* at = tile + line * 64 + lines_from;
          if (fetches) prefetch(at + kAhead);
          Line w = line_at(at);
          if (kSigned) w = signed_of(w);
          for (int m = 0; m < M; m++)
            sums[m] = add_products<kSigned>(sums[m], w, x[m].integers + half * 16 + line * 4);
        }
        const F scales = scales_at<kWide>(tile + scales_from + scale_from);
        for (int m = 0; m < M; m++)
          totals[m] = fma(as_floats(sums[m]) * splat(x[m].scales[half / 2]), scales, totals[m]);
      }
    } else {
      const int shares = std::min(format.group, width) / kShare;
      int share = 0;
      for (int column = 0; column < width; column += format.group, tile += tile_bytes) {
        F parts[M], lows[M];
        for (int m = 0; m < M; m++) parts[m] = lows[m] = splat(0.f);
        const uint8_t* lines = tile + place.skipped_bytes + lines_from;
        for (int end = share + shares; share < end; share++) {
          Int sums[M];
          for (int m = 0; m < M; m++)
            sums[m] = kCentered ? splat_integer(-(x[m].sums[share] << kShift)) : Int{};
          for (int line = 0; line < kBits; line++, lines += 64) {
            if (fetches) prefetch(lines + kAhead);
            Line w = line_at(lines);
            const int at = share * kShare + line * 4;
            if constexpr (kBits == 8) {
              if (kSigned) w = signed_of(w);
              for (int m = 0; m < M; m++)
                sums[m] = add_products<kSigned>(sums[m], w, x[m].integers + at);
            } else {
              const Line low = low_of(w), high = high_of(w);
              for (int m = 0; m < M; m++) {
                sums[m] = add_products<false>(sums[m], low, x[m].integers + at);
                sums[m] = add_products<false>(sums[m], high, x[m].integers + at + 16);
              }
            }
          }
          for (int m = 0; m < M; m++) {
            parts[m] = fma(as_floats(sums[m]), splat(x[m].scales[share]), parts[m]);
            if (kMinima) lows[m] = lows[m] + splat(x[m].scaled_sums[share]);
          }
        }
        const F scales = scales_at<kWide>(tile + scales_from + scale_from);
        for (int m = 0; m < M; m++) totals[m] = fma(parts[m], scales, totals[m]);
        if constexpr (kMinima) {
          const F minima = scales_at<kWide>(tile + minima_from + scale_from);
          for (int m = 0; m < M; m++) totals[m] = fma(lows[m], minima, totals[m]);
        }
      }
    }
    for (int m = 0; m < M; m++) store(out + m * kOutputs, totals[m]);
  }
};
