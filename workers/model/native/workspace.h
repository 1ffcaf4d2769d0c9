// The memory that a decoder computes in, taken once for as many rows as a call may have.
//
// Owns it, and gives it back. Invariant: it is zeros at first, and the padding of rows stays so
// whatever is computed; nothing takes memory while a pass is under way. Knows no operation.
#pragma once
#include <memory>
#include <new>

#include "attention_plan.h"
#include "operand.h"

namespace {

// What is taken from it lives as long as it, at multiples of 64 bytes.
class Memory {
 public:
  template <class T>
  T* take(size_t count) {
    const size_t size = (count * sizeof(T) + 63) / 64 * 64;
    taken_.emplace_back(nullptr);
    taken_.back().reset(operator new(size, std::align_val_t(64)));
    bytes_ += size;
    return static_cast<T*>(taken_.back().get());
  }
  // Zeros, so that padding is.
  template <class T>
  T* zeros(size_t count) {
    T* memory = take<T>(count);
    memset((void*)memory, 0, count * sizeof(T));
    return memory;
  }
  Forms forms(int num_rows, int64_t widest, bool packs) {
    Forms room;
    if (kWidens) room.widened = zeros<float>(size_t(num_rows) * widest);
    if (kHasTiles) room.paired = zeros<bf16>(size_t(num_rows) * widest);
    if (packs) room.shortened = zeros<char>(size_t(num_rows) * Shortened::bytes(int(widest)));
    return room;
  }
  size_t bytes() const { return bytes_; }

 private:
  struct Release {
    void operator()(void* at) const { operator delete(at, std::align_val_t(64)); }
  };
  std::vector<std::unique_ptr<void, Release>> taken_;
  size_t bytes_ = 0;
};

struct Workspace {
  // What each thread has for itself: rows of a call of one block, and what it notes down.
  struct Own {
    bf16 *hidden, *normed;
    Forms forms;
    bf16* row;
    AttentionScratch<VectorsAttention>* scratch;
#if defined(SET_AMX)
    AttentionScratch<TilesAttention>* tiles_scratch;
#endif
    Outcome outcome{};
  };

  explicit Workspace(const DecoderSpec& spec)
      : hidden_stride(padded(spec.hidden_size)),
        projected_stride(padded(spec.max_outputs)),
        attended_stride(padded(spec.max_attended)),
        gated_stride(padded(spec.intermediate_size)) {
    const int rows = (spec.max_rows + kRows - 1) / kRows * kRows;
    const int64_t widest = std::max({hidden_stride, attended_stride, gated_stride});
    hidden = memory.zeros<bf16>(size_t(rows) * hidden_stride);
    normed = memory.zeros<bf16>(size_t(rows) * hidden_stride);
    for (bf16*& one : sublayers) one = memory.zeros<bf16>(size_t(rows) * hidden_stride);
    projected = memory.zeros<bf16>(size_t(rows) * projected_stride);
    attended = memory.zeros<bf16>(size_t(rows) * attended_stride);
    gated = memory.zeros<bf16>(size_t(rows) * gated_stride);
    forms = memory.forms(rows, widest, spec.packs);
    own.resize(size_t(spec.num_threads));
    for (Own& one : own) {
      one.hidden = memory.zeros<bf16>(size_t(kRows) * hidden_stride);
      one.normed = memory.zeros<bf16>(size_t(kRows) * hidden_stride);
      one.forms = memory.forms(kRows, widest, spec.packs);
      one.row = memory.zeros<bf16>(size_t(std::max(projected_stride, hidden_stride)));
      one.scratch = memory.zeros<AttentionScratch<VectorsAttention>>(1);
#if defined(SET_AMX)
      one.tiles_scratch = memory.zeros<AttentionScratch<TilesAttention>>(1);
#endif
    }
    if (spec.kept_bits) take_sections(spec, rows);
    partials = memory.take<float>(size_t(num_slots(spec) * partial_size(spec.max_head_dim)));
  }

  void take_sections(const DecoderSpec& spec, int rows) {
    const int64_t one = int64_t(2) * kSection * spec.max_kv_heads * spec.max_head_dim;
    fresh = memory.take<bf16>(size_t(rows / kSection * one));
    for (Own& each : own) {
      each.scratch->widened = memory.zeros<Widened>(1);
      each.scratch->fresh = fresh;
#if defined(SET_AMX)
      each.tiles_scratch->widened = each.scratch->widened;
      each.tiles_scratch->fresh = fresh;
#endif
    }
  }

  Memory memory;
  const int64_t hidden_stride, projected_stride, attended_stride, gated_stride;
  bf16 *hidden, *normed, *sublayers[2], *projected, *attended, *gated;
  Forms forms;  // of as many rows as a call may have, one operand's at a time
  float* partials;
  bf16* fresh = nullptr;  // sections that begin and end in a call, one layer's
  std::vector<Own> own;
};

}  // namespace
