// Some layers of a decoder on the shared weights, and embedding and logits where they are among them.
//
// Owns the workspace, the threads, and the order of a pass. Nothing that the caller says is checked
// here. Invariant: weights are read where they lie and never written or repacked, and a row's result
// depends neither on the other rows of the call nor on the number of threads. A decoder does one call
// at a time.
#pragma once
#include "attention_step.h"
#include "experts.h"
#include "logits.h"
#include "residual_stream.h"

namespace {

class Decoder {
 public:
  explicit Decoder(const DecoderSpec& spec)
      : spec_(spec), space_(spec), mixture_(spec, space_.memory), threads_(new_threads()) {}

  ~Decoder() {
    if (threads_->of_this_process()) {
      threads_->stop();
      delete threads_;
    }
  }

  // False: no threads to be had.
  bool forward(Call& call) {
    // In a forked child the parent's threads don't exist, and their words may be in any state.
    if (!threads_->of_this_process()) threads_ = new_threads();
    threads_->use(call.num_threads);
    plan_.make(spec_, call, threads_->count());
    for (Workspace::Own& own : space_.own) own.outcome = {};
    Pass pass{spec_, call, space_, plan_, mixture_, *threads_, clock_};
    if (!threads_->run([](void* of, int index) { compute(*(const Pass*)of, index); }, &pass))
      return false;
    call.outcome = {};
    for (const Workspace::Own& own : space_.own)
      if (!call.outcome.result) call.outcome = own.outcome;
    return true;
  }

  int64_t hidden_stride() const { return space_.hidden_stride; }
  size_t workspace_bytes() const { return space_.memory.bytes(); }
  uint64_t counted(int operation) const { return clock_.counted(operation); }

 private:
  Threads* new_threads() const { return new Threads(spec_.num_threads); }

  // What each thread does of a pass.
  static void compute(const Pass& pass, int index) {
    const FlushDenormals flush;
#if defined(SET_AMX)
    static const TileConfig config;
    _tile_loadconfig(&config);
#endif
    if (index == 0) pass.clock.start();
    const Thread thread(pass, index);
    begin_stream(thread);
    for (int i = 0; i < pass.call.num_layers; i++) {
      const LayerSpec& layer = pass.call.layers[i];
      compute_layer(thread, layer, pass.plan.kind(i));
      join_layer(thread, layer);
    }
    leave_stream(thread);
    if (pass.call.num_logit_rows) compute_logits(thread);
#if defined(SET_AMX)
    _tile_release();
#endif
  }

  // Its last sublayer has not joined the stream.
  static void compute_layer(const Thread& thread, const LayerSpec& layer, const Kind& kind) {
    const bf16* x = normed(thread, layer.input_norm);
    attention_step(thread, layer, kind, x);
    thread.barrier();
    const bool one_by_one = is_one_by_one(layer);
    if (one_by_one) {
      join_attention(thread, layer);
      x = normed(thread, layer.mlp_norm);
    } else if (layer.mlp_norm.kind != kNoNorm) {
      x = normed(thread, layer.mlp_norm);
    }
    const Experts& experts = layer.experts;
    const Operand operand =
        thread.arranged(x, thread.pass.space.hidden_stride,
                        experts.num_experts ? experts.router : layer.gate_up);
    const int sublayer = one_by_one ? 0 : 1;
    if (experts.num_experts)
      thread.pass.mixture.compute(thread, experts, operand, sublayer);
    else
      feed_forward(thread, layer, operand, sublayer);
    thread.barrier();
  }

  const DecoderSpec spec_;
  Workspace space_;
  Mixture mixture_;
  AttentionPlan plan_;
  Clock clock_;
  Threads* threads_;
};

}  // namespace
