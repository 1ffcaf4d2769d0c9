// Attention of one layer: projections, what is done with heads before they meet, and the tasks.
//
// Invariant: keys and values of all rows are in their blocks, and the sections that they complete rounded,
// before any thread looks at one, for there are barriers between. Knows nothing of the arithmetic of attention (attention.h), nor of how
// it is cut (attention_plan.h).
#pragma once
#include "sublayer.h"

namespace {

// One norm over the queries of all heads, one over the keys, each in one piece.
inline void norm_all_heads(const Thread& thread, const LayerSpec& layer) {
  const Attention& a = layer.attention;
  const Workspace& space = thread.pass.space;
  const int widths[2] = {a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim};
  const Share units = thread.share(thread.pass.call.num_rows * 2);
  for (int unit = units.begin; unit < units.end; unit++) {
    const int which = unit % 2, width = widths[which];
    bf16* x = space.projected + unit / 2 * space.projected_stride + (which ? a.key : a.query);
    norm_apart(x, width, which ? layer.key_norm : layer.query_norm, thread.own.row);
  }
}

// Where head number `head` of queries, keys and values, in this order, is in a row of projections.
inline int place_of(const Attention& a, int head) {
  if (head < a.num_heads) return a.query + head * a.query_step;
  head -= a.num_heads;
  if (head < a.num_kv_heads) return a.key + head * a.key_step;
  return a.value + (head - a.num_kv_heads) * a.value_step;
}

// Where the keys of a row lie with those of the tokens beside it, before any are rounded; values follow.
inline bf16* rows_kept_at(const Pass& pass, const Attention& a, int row, int position) {
  const Call& call = pass.call;
  if (a.kept_bits)
    return pass.plan.run_of_row(row).open_section(a, pass.space.fresh, position / kSection);
  const int64_t* blocks = call.addresses + int64_t(call.tables[row]) * call.max_blocks;
  return (bf16*)(blocks[position / a.block_size] + a.layer_offset);
}

// Round the sections that this call completes.
inline void round_completed(const Thread& thread, const Attention& a) {
  const Pass& pass = thread.pass;
  const auto& completed = pass.plan.completed();
  const Share units = thread.share(int(completed.size()) * 2 * a.num_kv_heads);
  for (int unit = units.begin; unit < units.end; unit++) {
    const int index = unit / 2 / a.num_kv_heads, head = unit / 2 % a.num_kv_heads;
    const Completed& one = completed[size_t(index)];
    const Run& run = pass.plan.run(one);
    const bf16* keys = run.open_section(a, pass.space.fresh, one.section) +
                       int64_t(head) * kSection * a.head_dim;
    const Section to = run.section(a, one.section, head);
    if (unit % 2)
      round_values(to, keys + int64_t(a.num_kv_heads) * kSection * a.head_dim);
    else
      round_keys(to, keys);
  }
  thread.count(kRotate);
}

// Norm and rotate the heads of queries and keys; put keys and values into the blocks.
inline void rotate_and_keep(const Thread& thread, const LayerSpec& layer) {
  const Attention& a = layer.attention;
  const DecoderSpec& spec = thread.pass.spec;
  const Call& call = thread.pass.call;
  const Workspace& space = thread.pass.space;
  const int num_units = a.num_heads + 2 * a.num_kv_heads;
  const int values_from = a.num_heads + a.num_kv_heads;
  const int half = spec.rotary_dim / 2;
  if (layer.norms_all_heads) {
    norm_all_heads(thread, layer);
    thread.barrier();
  }
  const Share units = thread.share(call.num_rows * num_units);
  for (int unit = units.begin; unit < units.end; unit++) {
    const int row = unit / num_units, head = unit % num_units;
    const int position = call.positions[row];
    bf16* x = space.projected + row * space.projected_stride + place_of(a, head);
    if (head < values_from) {
      const Norm& norm = head < a.num_heads ? layer.query_norm : layer.key_norm;
      if (norm.kind != kNoNorm && !layer.norms_all_heads)
        norm_apart(x, a.head_dim, norm, thread.own.row);
      if (layer.rope >= 0)
        rotate(x, spec.rotary_dim, spec.rope_cos[layer.rope] + int64_t(position) * half,
               spec.rope_sin[layer.rope] + int64_t(position) * half, spec.rotation);
    }
    if (head >= a.num_heads) {
      const int size = a.kept_bits ? kSection : a.block_size;
      bf16* block = rows_kept_at(thread.pass, a, row, position);
      block += int64_t(head - a.num_heads) * size * a.head_dim;
      const int slot = position % size;
      const bool ends_run = row + 1 == call.num_rows || !goes_on(call, row + 1);
      if (head < values_from)
        keep_key(block, slot, a.head_dim, x);
      else
        keep_value(block, slot, a.head_dim, x, ends_run);
    }
  }
  thread.count(kRotate);
}

// The partial results of a split task as one.
inline void merge(const Pass& pass, const Attention& a, const Task& task, float* total) {
  const Workspace& space = pass.space;
  for (int head = 0; head < task.num_kv_heads; head++) {
    clear_partial(total, task.num_columns, a.head_dim);
    for (int p = 0; p < task.partition; p++) {
      const int slot = task.slot + p * task.num_kv_heads + head;
      const float* part = space.partials + slot * partial_size(a.head_dim);
      merge_partial(total, part, part + 16, part + 32, task.num_columns, padded(a.head_dim));
    }
    finish(a, pass.plan.run(task), task.kv_head + head, task.column, task.num_columns, total,
           space.attended, space.attended_stride);
  }
}

template <class Policy>
inline void attend_by(const Thread& thread, const Attention& a, const Kind& kind,
                      AttentionScratch<Policy>* scratch) {
  const Pass& pass = thread.pass;
  const Workspace& space = pass.space;
  for (int i; (i = pass.threads.take_in_order(int(kind.tasks.size()))) >= 0;) {
    const Task& task = kind.tasks[size_t(i)];
    const size_t next = size_t(i + pass.threads.count());
    if (next < kind.tasks.size()) {
      const Task& later = kind.tasks[next];
      AttentionTask<Policy>(a, pass.plan.run(later), later, *scratch).fetch_first();
    }
    AttentionTask<Policy>(a, pass.plan.run(task), task, *scratch)
        .compute(space.projected, space.projected_stride, space.partials, space.attended,
                 space.attended_stride);
  }
  thread.count(kAttend);
  if (kind.merges.empty()) return;
  thread.barrier();
  for (int i; (i = pass.threads.take_in_order(int(kind.merges.size()))) >= 0;)
    merge(pass, a, kind.merges[size_t(i)], scratch->total);
  thread.count(kAttend);
}

inline void attend(const Thread& thread, const LayerSpec& layer, const Kind& kind) {
#if defined(SET_AMX)
  if (layer.attention.head_dim % 32 == 0)
    return attend_by<TilesAttention>(thread, layer.attention, kind, thread.own.tiles_scratch);
#endif
  attend_by<VectorsAttention>(thread, layer.attention, kind, thread.own.scratch);
}

// The first sublayer: of `x`, the thread's own rows, and of all that came before in the blocks.
inline void attention_step(const Thread& thread, const LayerSpec& layer, const Kind& kind,
                           const bf16* x) {
  const Workspace& space = thread.pass.space;
  into_rows(thread, layer.qkv, thread.arranged(x, space.hidden_stride, layer.qkv), space.projected,
            space.projected_stride);
  thread.count(kQkv);
  thread.barrier();
  rotate_and_keep(thread, layer);
  thread.barrier();
  if (!thread.pass.plan.completed().empty()) {
    round_completed(thread, layer.attention);
    thread.barrier();
  }
  attend(thread, layer, kind);
  thread.barrier();
  to_sublayer(thread, layer.output,
              thread.arranged(space.attended, space.attended_stride, layer.output), 0);
  thread.count(kOutput);
}

}  // namespace
