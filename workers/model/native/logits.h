// Logits of the rows that a call asks for: the final norm, the head, its scale and cap.
//
// Invariant: rows and outputs that nobody asked for are neither computed nor written.
#pragma once
#include "multiply.h"

namespace {

inline F final_logits(const DecoderSpec& spec, F x) {
  if (spec.logit_scale != 1.f) x = x * splat(spec.logit_scale);
  if (spec.logit_softcap != 0) {
    const F cap = splat(spec.logit_softcap);
    x = rounded(rounded(tanh_of(rounded(rounded(x) / cap))) * cap);
  }
  return x;
}

inline void compute_logits(const Thread& thread) {
  const Pass& pass = thread.pass;
  const DecoderSpec& spec = pass.spec;
  const Call& call = pass.call;
  const int64_t stride = pass.space.hidden_stride;
  const int num_rows = call.num_logit_rows;
  if (!pass.alone()) thread.barrier();  // all rows are there
  // Few rows each thread norms for itself, whoever has computed them.
  const bool few = num_rows <= kRows;
  bf16* normed = few ? thread.own.normed : pass.space.normed;
  const Share mine = few ? Share{0, num_rows} : thread.share_of_blocks(num_rows);
  for (int at = mine.begin; at < mine.end; at++)
    norm_into(thread.hidden() + call.logit_rows[at] * stride, spec.hidden_size, spec.final_norm,
              normed + at * stride);
  const Operand x(normed, stride, spec.head, few ? thread.own.forms : pass.space.forms);
  x.arrange(mine.begin, mine.end);
  if (!few) thread.barrier();
  const int64_t vocab = spec.head.num_outputs;
  multiply(thread, spec.head, x, num_rows,
           [&](const Chunk& chunk, int block, const Product& product) {
             each_row(chunk, product, std::min(kRows, num_rows - block * kRows),
                      [&](int m, int output, int step, int count, F value) {
                        const int64_t row = int64_t(block) * kRows + m;
                        scatter(call.logits + row * vocab + output, step, final_logits(spec, value),
                                count);
                      });
           });
  thread.count(kLogits);
}

}  // namespace
