// Rounds rows of weights to 8 or 4 bits, without the interpreter's lock.
//
// A group is `group_size` elements of a row that have one scale, or a whole row. Its scale comes from
// its range, is rounded to how it will be stored, and only then divides: what is stored is what was
// rounded by. Invariants: the results are those of reference.py bit for bit, on every instruction set
// and however a tensor is cut into tiles; nothing outside of a tile's own rows is written. All
// arithmetic is plain IEEE fp32, one rounding at a time (-ffp-contract=off); integers find ranges.
//
// The structure is that of native.py, and its size is compared.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

extern "C" {

struct Tile {
  int64_t source;       // [num_rows, num_columns], contiguous
  int64_t quantized;    // [num_rows] of `row_bytes`
  int64_t scales;       // [num_rows, num_groups]
  int64_t zero_points;  // [num_rows, num_groups] int8, or 0 where symmetric
  int64_t num_rows, num_columns, group_size, row_bytes;
  int32_t type;              // Type, of weights and of scales
  int32_t num_bits, packed;  // packed: offset binary, low bits first; else int8
  int32_t num_candidates;    // of ranges that are tried, from the whole one down
};

// Of a group, in floats: its least and its largest element.
struct Range {
  float low, high;
};

}  // extern "C"

namespace {

enum Type : int32_t { kBF16 = 0, kF16 = 1, kF32 = 2 };

constexpr int kLanes = 16;          // of a sum of losses: the order in which they are added
constexpr int kBlock = 256;         // elements whose losses are added in fp32
constexpr int kCandidateSteps = 40;  // candidate k is (40 - k) / 40 of the range
constexpr int kBuffer = 1024;
constexpr int64_t kFinite = -1;

float as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

uint32_t as_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

struct BF16 {
  using Integer = int16_t;
  static constexpr Integer kInfinity = 0x7f80;
  static float load(Integer bits) { return as_float(uint32_t(uint16_t(bits)) << 16); }
  static float largest() { return as_float(0x7f7f0000); }
};

struct F16 {
  using Integer = int16_t;
  static constexpr Integer kInfinity = 0x7c00;
  // Exponents are moved by 112, by a product: that makes numbers of subnormals, too.
  static float load(Integer bits) {
    const uint32_t word = uint16_t(bits);
    const float scaled = as_float((word & 0x7fff) << 13) * as_float(0x77800000);
    return as_float(as_bits(scaled) | (word & 0x8000) << 16);
  }
  static float largest() { return 65504.0f; }
};

struct F32 {
  using Integer = int32_t;
  static constexpr Integer kInfinity = 0x7f800000;
  static float load(Integer bits) { return as_float(uint32_t(bits)); }
  static float largest() { return std::numeric_limits<float>::max(); }
};

// A positive scale as it will be stored: to the nearest; up where so little is left of its bits that
// the nearest would cut off what is near the range's end.
float stored_bf16(float value) {
  uint32_t bits = as_bits(value);
  const bool subnormal = bits < 0x00800000;
  const uint32_t nearest = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000;
  return as_float(subnormal && nearest < bits ? nearest + 0x10000 : nearest);
}

float stored_f16(float value) {
  const float least = as_float(0x38800000);  // 2^-14, of those with all bits
  if (value < least) {
    const float step = as_float(0x33800000);  // 2^-24
    return std::ceil(value / step) * step;
  }
  const uint32_t bits = as_bits(value);
  return as_float((bits + 0xfff + (bits >> 13 & 1)) & 0xffffe000);
}

uint16_t f16_bits(float value) {  // of one that is exactly an fp16
  if (value < as_float(0x38800000)) return uint16_t(value / as_float(0x33800000));
  return uint16_t((as_bits(value) - (112u << 23)) >> 13);
}

float stored(float value, int32_t type) {
  return type == kBF16 ? stored_bf16(value) : type == kF16 ? stored_f16(value) : value;
}

struct Scale {
  float value, zero_point;
};

// What a range is divided by, `candidate` steps smaller than it is.
Scale scale_of(const Tile& tile, Range range, int candidate, float largest) {
  const float least = float(-(1 << (tile.num_bits - 1))), most = -least - 1;
  const float kept = float(kCandidateSteps - candidate) / kCandidateSteps;
  const bool symmetric = !tile.zero_points;
  float value;
  if (symmetric) {
    value = std::max(-range.low, range.high) * kept / ((most - least) / 2);
  } else {
    range = {std::min(range.low, 0.0f) * kept, std::max(range.high, 0.0f) * kept};
    value = float((double(range.high) - double(range.low)) / double(most - least));
  }
  if (!(value > 0)) return {1, 0};  // all are 0, or so small that nothing else is left of them
  value = stored(value, tile.type);
  float zero_point = 0;
  if (!symmetric)
    zero_point = std::min(std::max(std::nearbyint(least - range.low / value), least), most);
  // The farthest level must still be a number of the tensor's own type.
  const float farthest = std::max(zero_point - least, most - zero_point);
  if (value > largest / farthest) {
    value = largest / farthest;
    if (tile.type == kBF16) value = as_float(as_bits(value) & 0xffff0000);
    if (tile.type == kF16) value = as_float(as_bits(value) & 0xffffe000);
    if (!symmetric)
      zero_point = std::min(std::max(std::nearbyint(least - range.low / value), least), most);
  }
  return {value, zero_point};
}

// A float of at most 2^22 plus this is rounded to the nearest integer, which its last bits are.
constexpr uint32_t kRoundingBits = 0x4b400000;  // 1.5 * 2^23

template <typename S>
inline int32_t level(typename S::Integer bits, Scale scale, int32_t least, int32_t most) {
  const float rounded = S::load(bits) / scale.value + scale.zero_point + as_float(kRoundingBits);
  return std::min(std::max(int32_t(as_bits(rounded) - kRoundingBits), least), most);
}

// Folds a stretch into a range; the index of the first element that is no number, or kFinite.
template <typename S>
int64_t fold(const typename S::Integer* source, int64_t num, Range& range, bool symmetric) {
  using Integer = typename S::Integer;
  constexpr Integer kMagnitude = std::numeric_limits<Integer>::max();
  bool finite;
  if (symmetric) {  // how large is all that is asked
    Integer most = 0;
    for (int64_t i = 0; i < num; i++) most = std::max(most, Integer(source[i] & kMagnitude));
    finite = most < S::kInfinity;
    range.high = std::max(range.high, S::load(most));
  } else {  // as integers they have the order of the numbers
    constexpr int kSign = sizeof(Integer) * 8 - 1;
    Integer low = kMagnitude, high = Integer(~kMagnitude);
    for (int64_t i = 0; i < num; i++) {
      const Integer ordered = Integer(source[i] ^ ((source[i] >> kSign) & kMagnitude));
      low = std::min(low, ordered);
      high = std::max(high, ordered);
    }
    finite = high < S::kInfinity && low > Integer(~S::kInfinity);
    range.low = std::min(range.low, S::load(Integer(low ^ ((low >> kSign) & kMagnitude))));
    range.high = std::max(range.high, S::load(Integer(high ^ ((high >> kSign) & kMagnitude))));
  }
  if (finite) return kFinite;
  int64_t bad = 0;
  while ((source[bad] & kMagnitude) < S::kInfinity) bad++;
  return bad;
}

// Adds what rounding a stretch loses, squared, in the order that reference.py has, too.
template <typename S>
void add_loss(const typename S::Integer* source, int64_t num, Scale scale, int32_t least,
              int32_t most, double& loss) {
  for (int64_t begin = 0; begin < num; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, num);
    float lanes[kLanes] = {};
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes)
      for (int j = 0; j < kLanes; j++) {
        const int32_t rounded = level<S>(source[i + j], scale, least, most);
        const float off = S::load(source[i + j]) - (float(rounded) - scale.zero_point) * scale.value;
        lanes[j] += off * off;
      }
    for (int j = 0; i < end; i++, j++) {
      const int32_t rounded = level<S>(source[i], scale, least, most);
      const float off = S::load(source[i]) - (float(rounded) - scale.zero_point) * scale.value;
      lanes[j] += off * off;
    }
    double sum = 0;
    for (float lane : lanes) sum += lane;
    loss += sum;
  }
}

// Levels of a stretch, which begins at element `at` of its row.
template <typename S>
void write(const Tile& tile, const typename S::Integer* source, int64_t num, Scale scale,
           uint8_t* row, int64_t at) {
  const int32_t least = -(1 << (tile.num_bits - 1)), most = -least - 1;
  if (tile.num_bits == 8) {
    const uint8_t offset = tile.packed ? 0x80 : 0;
    for (int64_t i = 0; i < num; i++)
      row[at + i] = uint8_t(level<S>(source[i], scale, least, most)) ^ offset;
    return;
  }
  uint8_t levels[kBuffer];
  for (int64_t begin = 0; begin < num; begin += kBuffer) {
    const int64_t part = std::min<int64_t>(kBuffer, num - begin);
    for (int64_t i = 0; i < part; i++)
      levels[i] = uint8_t(level<S>(source[begin + i], scale, least, most) + 8);
    if (part & 1) levels[part] = 0;
    uint8_t* out = row + (at + begin) / 2;  // groups begin at even elements
    for (int64_t i = 0; i < (part + 1) / 2; i++) {
      uint16_t pair;
      memcpy(&pair, levels + 2 * i, 2);
      out[i] = uint8_t(pair | pair >> 4);
    }
  }
}

void store_scale(const Tile& tile, int64_t index, Scale scale) {
  if (tile.type == kF32)
    reinterpret_cast<float*>(tile.scales)[index] = scale.value;
  else
    reinterpret_cast<uint16_t*>(tile.scales)[index] =
        tile.type == kF16 ? f16_bits(scale.value) : uint16_t(as_bits(scale.value) >> 16);
  if (tile.zero_points) reinterpret_cast<int8_t*>(tile.zero_points)[index] = int8_t(scale.zero_point);
}

int best_of(const double* losses, int num) {
  return int(std::min_element(losses, losses + num) - losses);  // of equals the first
}

template <typename S>
int64_t quantize(const Tile& tile) {
  using Integer = typename S::Integer;
  const int32_t least = -(1 << (tile.num_bits - 1)), most = -least - 1;
  const int64_t num_groups = tile.num_columns / tile.group_size;
  for (int64_t r = 0; r < tile.num_rows; r++) {
    const Integer* source = reinterpret_cast<const Integer*>(tile.source) + r * tile.num_columns;
    uint8_t* row = reinterpret_cast<uint8_t*>(tile.quantized) + r * tile.row_bytes;
    for (int64_t g = 0; g < num_groups; g++) {
      const Integer* group = source + g * tile.group_size;
      Range range{0, 0};
      const int64_t bad = fold<S>(group, tile.group_size, range, !tile.zero_points);
      if (bad != kFinite) return r * tile.num_columns + g * tile.group_size + bad;
      int chosen = 0;
      if (tile.num_candidates > 1) {
        double losses[kCandidateSteps] = {};
        for (int k = 0; k < tile.num_candidates; k++)
          add_loss<S>(group, tile.group_size, scale_of(tile, range, k, S::largest()), least, most,
                      losses[k]);
        chosen = best_of(losses, tile.num_candidates);
      }
      const Scale scale = scale_of(tile, range, chosen, S::largest());
      store_scale(tile, r * num_groups + g, scale);
      write<S>(tile, group, tile.group_size, scale, row, g * tile.group_size);
    }
    // What is left of the last word of a row that is packed.
    const int64_t used = (tile.num_columns * tile.num_bits + 7) / 8;
    memset(row + used, 0, size_t(tile.row_bytes - used));
  }
  return kFinite;
}

// One row in several tiles: its range first, then what the candidates lose, then its levels.
enum Step : int32_t { kRange = 0, kLosses = 1, kLevels = 2 };

template <typename S>
int64_t step(const Tile& tile, int32_t what, Range& range, double* losses, int32_t settled) {
  using Integer = typename S::Integer;
  const int32_t least = -(1 << (tile.num_bits - 1)), most = -least - 1;
  const Integer* source = reinterpret_cast<const Integer*>(tile.source);
  if (what == kRange) return fold<S>(source, tile.num_columns, range, !tile.zero_points);
  if (what == kLosses) {
    for (int k = 0; k < tile.num_candidates; k++)
      add_loss<S>(source, tile.num_columns, scale_of(tile, range, k, S::largest()), least, most,
                  losses[k]);
    return kFinite;
  }
  const int chosen = settled ? best_of(losses, tile.num_candidates) : 0;
  const Scale scale = scale_of(tile, range, chosen, S::largest());
  store_scale(tile, 0, scale);
  uint8_t* row = reinterpret_cast<uint8_t*>(tile.quantized);
  write<S>(tile, source, tile.num_columns, scale, row, 0);
  const int64_t used = (tile.num_columns * tile.num_bits + 7) / 8;
  memset(row + used, 0, size_t(tile.row_bytes - used));
  return kFinite;
}

}  // namespace

extern "C" {

int64_t onecopy_quantize_size_of_tile() { return sizeof(Tile); }

// -1, or the index in the tile of the first element that is no number; the rest is undefined then.
int64_t onecopy_quantize_rows(const Tile* tile) {
  switch (tile->type) {
    case kBF16: return quantize<BF16>(*tile);
    case kF16: return quantize<F16>(*tile);
    default: return quantize<F32>(*tile);
  }
}

// The same for a part of one row that is one group; parts begin at multiples of 256 elements.
int64_t onecopy_quantize_step(const Tile* tile, int32_t what, Range* range, double* losses,
                              int32_t settled) {
  switch (tile->type) {
    case kBF16: return step<BF16>(*tile, what, *range, losses, settled);
    case kF16: return step<F16>(*tile, what, *range, losses, settled);
    default: return step<F32>(*tile, what, *range, losses, settled);
  }
}

}  // extern "C"
