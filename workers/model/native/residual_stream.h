// The residual stream: where it begins, and what sublayers add to it.
//
// Each thread does this for its own rows (pass.h). Invariant: a row of the stream is rounded to bf16
// where transformers' modules round it. Knows nothing of how a sublayer computes.
#pragma once
#include "pass.h"

namespace {

// `more` has no zeros behind it.
inline void add_to_row(bf16* row, const bf16* more, int size) {
  for (int k = 0; k < size; k += kLanes)
    store16(row + k, load16(row + k) + load16(more + k, size - k));
}

// A token's row, as the first layer takes it.
inline void embed(const DecoderSpec& spec, int64_t token, int position, bf16* to) {
  const int size = spec.hidden_size;
  if (is_packed(spec.embedding))
    unpack_row(spec.embedding, size, token, to);
  else
    memcpy(to, (const bf16*)spec.embedding.weight + token * size, size_t(size) * 2);
  if (spec.embedding_scale != 0)
    for (int k = 0; k < size; k += kLanes)
      store16(to + k, load16(to + k) * splat(spec.embedding_scale));
  if (spec.type_embedding) add_to_row(to, spec.type_embedding, size);
  if (spec.position_embedding)
    add_to_row(to, spec.position_embedding + int64_t(position) * size, size);
  if (spec.embedding_norm.kind != kNoNorm) norm_into(to, size, spec.embedding_norm, to);
}

// Embedded, or as an earlier call left it.
inline void begin_stream(const Thread& thread) {
  const Call& call = thread.pass.call;
  const int64_t stride = thread.pass.space.hidden_stride;
  const Share rows = thread.rows();
  for (int row = rows.begin; row < rows.end; row++) {
    bf16* to = thread.hidden() + row * stride;
    if (call.token_ids)
      embed(thread.pass.spec, call.token_ids[row], call.positions[row], to);
    else
      memcpy(to, call.hidden + row * stride, size_t(stride) * 2);
  }
}

// What a sublayer gave, and its norm where there is one.
inline void add(const Thread& thread, int sublayer, const Norm& norm) {
  const Pass& pass = thread.pass;
  const Share rows = thread.rows();
  for (int row = rows.begin; row < rows.end; row++) {
    const int64_t at = row * pass.space.hidden_stride;
    add_into(thread.hidden() + at, pass.space.sublayers[sublayer] + at, pass.spec.hidden_size, norm,
             pass.spec.residual_scale);
  }
  thread.count(kNorm);
}

// What the first sublayer gave; then the norm is of the sum.
inline void add_and_norm(const Thread& thread, const Norm& norm) {
  const Pass& pass = thread.pass;
  const int size = pass.spec.hidden_size;
  const Share rows = thread.rows();
  for (int row = rows.begin; row < rows.end; row++) {
    const int64_t at = row * pass.space.hidden_stride;
    bf16* hidden = thread.hidden() + at;
    add_to_row(hidden, pass.space.sublayers[0] + at, size);
    norm_into(hidden, size, norm, hidden);
  }
  thread.count(kNorm);
}

// The sum of what both sublayers gave.
inline void add_both(const Thread& thread) {
  const Workspace& space = thread.pass.space;
  const Share rows = thread.rows();
  for (int row = rows.begin; row < rows.end; row++) {
    const int64_t at = row * space.hidden_stride;
    const bf16 *first = space.sublayers[0] + at, *second = space.sublayers[1] + at;
    bf16* hidden = thread.hidden() + at;
    for (int k = 0; k < space.hidden_stride; k += kLanes) {
      const F both = rounded(load16(first + k) + load16(second + k));
      store16(hidden + k, load16(hidden + k) + both);
    }
  }
  thread.count(kNorm);
}

// Whether the MLP takes what attention gave.
inline bool is_one_by_one(const LayerSpec& layer) {
  return layer.residual == kOneByOne || layer.residual == kNormedSums;
}

// Add what attention gave, before an MLP that takes it.
inline void join_attention(const Thread& thread, const LayerSpec& layer) {
  if (layer.residual == kNormedSums)
    add_and_norm(thread, layer.attention_norm);
  else
    add(thread, 0, layer.attention_norm);
}

// Add what a layer's sublayers gave, as far as that has not been done.
inline void join_layer(const Thread& thread, const LayerSpec& layer) {
  switch (layer.residual) {
    case kOneByOne: return add(thread, 0, layer.mlp_output_norm);
    case kNormedSums: return add_and_norm(thread, layer.mlp_output_norm);
    case kTogether: return add_both(thread);
    default:
      for (int i = 0; i < 2; i++) add(thread, i, Norm{});
  }
}

// What goes into the next sublayer: the thread's own rows of it are there.
inline const bf16* normed(const Thread& thread, const Norm& norm) {
  if (norm.kind == kNoNorm) return thread.hidden();
  const Share rows = thread.rows();
  for (int row = rows.begin; row < rows.end; row++) {
    const int64_t at = row * thread.pass.space.hidden_stride;
    norm_into(thread.hidden() + at, thread.pass.spec.hidden_size, norm, thread.normed() + at);
  }
  thread.count(kNorm);
  return thread.normed();
}

// To whom it may concern: the caller, who computes the layers behind these.
inline void leave_stream(const Thread& thread) {
  const Pass& pass = thread.pass;
  if (!pass.call.hidden || (pass.alone() && !thread.is_first())) return;
  const int64_t stride = pass.space.hidden_stride;
  const Share rows = thread.rows();
  for (int row = rows.begin; row < rows.end; row++) {
    bf16* to = pass.call.hidden + row * stride;
    memcpy(to, thread.hidden() + row * stride, size_t(stride) * 2);
    if (pass.call.norms_hidden && pass.spec.final_norm.kind != kNoNorm)
      norm_into(to, pass.spec.hidden_size, pass.spec.final_norm, to);
  }
}

}  // namespace
