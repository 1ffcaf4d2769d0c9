// A sublayer's last product, and its sum over the ranks that each have some of its columns.
//
// Invariants: every thread comes to every barrier, whatever becomes of the ranks; parts are added in
// the ranks' order, so that all have the same bits. Knows nothing of how ranks come to each other's
// parts (all_reduce.cpp).
#pragma once
#include "multiply.h"

namespace {

// After an error threads go on, so that all of them come to every barrier; the group then lets
// nobody wait any more, and what is computed is of no use.
inline void sum_to_sublayer(const Thread& thread, const Linear& linear, const Operand& x,
                            int sublayer) {
  const Pass& pass = thread.pass;
  const Ranks& ranks = pass.spec.ranks;
  const int64_t stride = pass.space.hidden_stride;
  float* part = ranks.own_part(ranks.group);
  multiply(thread, linear, x, pass.call.num_rows,
           [&](const Chunk& chunk, int block, const Product& product) {
             each_row(chunk, product, pass.rows_of(block),
                      [&](int m, int output, int step, int count, F value) {
                        float* row = part + (int64_t(block) * kRows + m) * stride;
                        scatter(row + output, step, value, count);
                      });
           });
  thread.barrier();
  if (thread.is_first()) ranks.publish(ranks.group);
  thread.barrier();
  Outcome& outcome = thread.own.outcome;
  if (!outcome.result) ranks.wait(ranks.group, ranks.timeout_ns, &outcome);
  const int size = pass.spec.hidden_size;
  const Share rows = thread.share(pass.call.num_rows);
  for (int row = rows.begin; row < rows.end; row++) {
    const int64_t at = row * stride;
    for (int k = 0; k < size; k += kLanes) {
      F sum = load(ranks.part_of(ranks.group, 0) + at + k);
      for (int rank = 1; rank < ranks.num_ranks; rank++)
        sum = sum + load(ranks.part_of(ranks.group, rank) + at + k);
      store16(pass.space.sublayers[sublayer] + at + k, sum, size - k);
    }
  }
}

inline void to_sublayer(const Thread& thread, const Linear& linear, const Operand& x, int sublayer) {
  const Pass& pass = thread.pass;
  if (pass.spec.ranks.group) return sum_to_sublayer(thread, linear, x, sublayer);
  into_rows(thread, linear, x, pass.space.sublayers[sublayer], pass.space.hidden_stride);
}

}  // namespace
