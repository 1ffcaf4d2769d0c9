// The MLP of one layer: gate and up, or up alone, the activation, and down.
//
// Invariant: gate and up are rounded before the activation, and their product once, as transformers'
// modules do. Knows no experts.
#pragma once
#include "sublayer.h"

namespace {

// activation(gate) * up of a chunk that has a group of each.
template <class Activation>
inline void store_gated(const Chunk& chunk, const Product& product, int num_rows,
                        Activation activation, bf16* to, int64_t stride) {
  const Group &gate = chunk.groups[0], &up = chunk.groups[1];
  for (int n = 0; n < gate.count; n += kLanes) {
    const int count = gate.count - n;
    const F gate_bias = biases_of(gate, n, count), up_bias = biases_of(up, n, count);
    for (int m = 0; m < num_rows; m++) {
      const F g = rounded(load(product.out[m] + n) + gate_bias);
      const F u = rounded(load(product.out[m] + kGroup + n) + up_bias);
      scatter16(to + m * stride + gate.output + n * gate.step, gate.step,
                rounded(activation(g)) * u, count);
    }
  }
}

inline void gate_and_up(const Thread& thread, const Linear& gate_up, const Operand& x) {
  const Pass& pass = thread.pass;
  const int64_t stride = pass.space.gated_stride;
  const int num_rows = pass.call.num_rows;
  const auto row_of = [&](int block, int m) {
    return pass.space.gated + (int64_t(block) * kRows + m) * stride;
  };
  with_activation(pass.spec.activation, [&](auto activation) {
    if (gate_up.num_matrices == 1)
      return multiply(thread, gate_up, x, num_rows,
                      [&](const Chunk& chunk, int block, const Product& product) {
                        each_row(chunk, product, pass.rows_of(block),
                                 [&](int m, int output, int step, int count, F value) {
                                   scatter16(row_of(block, m) + output, step,
                                             activation(rounded(value)), count);
                                 });
                      });
    const Cut cut = cut_for(gate_up, num_rows) == kBands ? kBands : kGroups;
    multiply(
        thread, gate_up.width, num_gated_chunks(gate_up), x, num_rows,
        [&](int index) { return gated_chunk_of(gate_up.matrices, index, cut); },
        [&](const Chunk& chunk, int block, const Product& product) {
          store_gated(chunk, product, pass.rows_of(block), activation, row_of(block, 0), stride);
        });
  });
}

// The second sublayer, of rows that are arranged.
inline void feed_forward(const Thread& thread, const LayerSpec& layer, const Operand& x,
                         int sublayer) {
  const Workspace& space = thread.pass.space;
  gate_and_up(thread, layer.gate_up, x);
  thread.count(kGateUp);
  thread.barrier();
  to_sublayer(thread, layer.down, thread.arranged(space.gated, space.gated_stride, layer.down),
              sublayer);
  thread.count(kDown);
}

}  // namespace
