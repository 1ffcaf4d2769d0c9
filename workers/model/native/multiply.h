// Products of a linear's matrices with rows of activations, shared out over the threads.
//
// Owns how a linear is cut and by what each chunk is multiplied: on tiles, by vectors, or packed.
// Invariant: an output's bits depend on its row and its weights alone, not on the thread that computes
// it nor on the rows beside it. Knows not what becomes of a product.
#pragma once
#include "pass.h"

namespace {

// Rows up to which memory is the limit.
constexpr int kFew = 4;

inline Cut cut_for_rows(int num_rows) { return num_rows <= kFew ? kBands : kGroups; }

inline Cut cut_for(const Linear& linear, int num_rows) {
  if (any_packed(linear)) return kGroups;
#if defined(SET_AMX)
  for (int i = 0; i < linear.num_matrices; i++)
    if (Tiles::takes(linear.matrices[i], linear.width)) return kDoubles;
#endif
  return cut_for_rows(num_rows);
}

#if defined(SET_AMX)
inline bool tiled(const Chunk& chunk, int width) {
  for (int g = 0; g < chunk.num_groups; g++)
    if (!Tiles::takes(*chunk.groups[g].matrix, width)) return false;
  return true;
}
#endif

// The groups of a chunk that are not packed.
inline void multiply_plain(const Chunk& chunk, int width, const Block<Vectors::Element>& block,
                           Product& product) {
  for (int g = 0; g < chunk.num_groups; g++) {
    if (is_packed(*chunk.groups[g].matrix)) continue;
    Product part;
    Vectors::multiply(Chunk{{chunk.groups[g]}, 1}, width, block, part);
    for (int m = 0; m < block.num_rows; m++)
      memcpy(product.out[m] + g * kGroup, part.out[m], kGroup * sizeof(float));
  }
}

// Rows of x from `row` on. A chunk's groups may be of matrices in different formats.
inline void multiply_rows(const Chunk& chunk, int width, const Operand& x, int row, int num_rows,
                          Product& product) {
  int num_packed = 0;
  for (int g = 0; g < chunk.num_groups; g++) num_packed += is_packed(*chunk.groups[g].matrix);
  if (num_packed < chunk.num_groups) {
    Block<Vectors::Element> block;
    x.block(row, num_rows, block);
    if (!num_packed) return Vectors::multiply(chunk, width, block, product);
    multiply_plain(chunk, width, block, product);
  }
  ShortBlock block;
  x.block(row, num_rows, block);
  for (int g = 0; g < chunk.num_groups; g++)
    if (is_packed(*chunk.groups[g].matrix))
      Packed::multiply(chunk.groups[g], width, block, product.out[0] + g * kGroup);
}

// Calls out(chunk, block, product) for each chunk that this thread takes and each block.
template <class ChunkAt, class Out>
inline void multiply(const Thread& thread, int width, int chunks, const Operand& x, int num_rows,
                     ChunkAt chunk_at, Out out) {
  Product products[2];
  const int blocks = (num_rows + kRows - 1) / kRows;
  for (int index; (index = thread.pass.threads.take(thread.index, chunks)) >= 0;) {
    const Chunk chunk = chunk_at(index);
    for (int b = 0; b < blocks;) {
#if defined(SET_AMX)
      if (tiled(chunk, width)) {
        const bf16* paired[2];
        int counts[2];
        const int together = std::min(2, blocks - b);
        for (int i = 0; i < together; i++) {
          paired[i] = x.paired_block((b + i) * kRows);
          counts[i] = std::min(kRows, num_rows - (b + i) * kRows);
        }
        if (together == 2)
          Tiles::multiply<2>(chunk, width, paired, counts, products);
        else
          Tiles::multiply<1>(chunk, width, paired, counts, products);
        for (int i = 0; i < together; i++) out(chunk, b + i, products[i]);
        b += together;
        continue;
      }
#endif
      multiply_rows(chunk, width, x, b * kRows, std::min(kRows, num_rows - b * kRows), products[0]);
      out(chunk, b, products[0]);
      b++;
    }
  }
}
template <class Out>
inline void multiply(const Thread& thread, const Linear& linear, const Operand& x, int num_rows,
                     Out out) {
  const Cut cut = cut_for(linear, num_rows);
  multiply(
      thread, linear.width, num_chunks(linear, cut), x, num_rows,
      [&](int index) { return chunk_of(linear, index, cut); }, out);
}

// Products as bf16 rows.
inline void into_rows(const Thread& thread, const Linear& linear, const Operand& x, bf16* to,
                      int64_t stride) {
  multiply(thread, linear, x, thread.pass.call.num_rows,
           [&](const Chunk& chunk, int block, const Product& product) {
             each_row(chunk, product, thread.pass.rows_of(block),
                      [&](int m, int output, int step, int count, F value) {
                        bf16* row = to + (int64_t(block) * kRows + m) * stride;
                        scatter16(row + output, step, value, count);
                      });
           });
}

// Of up to a vector of `values` the first `count`, `step` elements apart.
inline void scatter(float* to, int step, F values, int count) {
  alignas(64) float part[kLanes];
  store(part, values);
  count = std::min(count, kLanes);
  if (step == 1) return (void)memcpy(to, part, size_t(count) * sizeof(float));
  for (int i = 0; i < count; i++) to[int64_t(i) * step] = part[i];
}

}  // namespace
