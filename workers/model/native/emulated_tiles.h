// AMX tiles in plain C++, for tests on processors that have none: the same eight registers, the same
// layouts. Slow, and rounds a little otherwise than the real ones.
#pragma once
#include <cstring>

#include "vector.h"

namespace emulated {

struct Tile {
  alignas(64) unsigned char rows[16][64];
};
inline thread_local Tile tiles[8];

inline void load(int tile, const void* from, int64_t stride) {
  for (int i = 0; i < 16; i++) memcpy(tiles[tile].rows[i], (const char*)from + i * stride, 64);
}
inline void store(int tile, void* to, int64_t stride) {
  for (int i = 0; i < 16; i++) memcpy((char*)to + i * stride, tiles[tile].rows[i], 64);
}
inline void zero(int tile) { memset(tiles[tile].rows, 0, sizeof tiles[tile].rows); }
inline void multiply(int to, int a, int b) {
  for (int m = 0; m < 16; m++) {
    float sums[16];
    memcpy(sums, tiles[to].rows[m], 64);
    for (int k = 0; k < 16; k++) {
      bf16 x[2];
      memcpy(x, tiles[a].rows[m] + 4 * k, 4);
      for (int n = 0; n < 16; n++) {
        bf16 y[2];
        memcpy(y, tiles[b].rows[k] + 4 * n, 4);
        sums[n] += one(x[0]) * one(y[0]);
        sums[n] += one(x[1]) * one(y[1]);
      }
    }
    memcpy(tiles[to].rows[m], sums, 64);
  }
}

}  // namespace emulated

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#undef _tile_loadconfig
#undef _tile_release
#define _tile_loadd(tile, from, stride) emulated::load(tile, from, stride)
#define _tile_stored(tile, to, stride) emulated::store(tile, to, stride)
#define _tile_zero(tile) emulated::zero(tile)
#define _tile_dpbf16ps(to, a, b) emulated::multiply(to, a, b)
#define _tile_loadconfig(config) (void)(config)
#define _tile_release() (void)0
