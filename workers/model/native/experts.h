// A mixture of experts in the MLP's place: who is chosen for which row, and what they give.
//
// Owns the choices of the present layer and the memory that experts compute in. Invariants: choices are
// made by one thread between two barriers and then read by all; what a row's experts gave is added in
// the experts' order, whoever computed it; a pass takes no memory. Weights of experts are bf16.
#pragma once
#include <cmath>

#include "feed_forward.h"

namespace {

class Mixture {
 public:
  Mixture(const DecoderSpec& spec, Memory& memory)
      : routed_stride_(padded(spec.max_experts)), inner_stride_(padded(spec.expert_intermediate)) {
    if (!spec.max_experts) return;
    const int rows = (spec.max_rows + kRows - 1) / kRows * kRows;
    const size_t choices = size_t(spec.max_rows) * spec.max_top_k;
    routed_ = memory.zeros<bf16>(size_t(rows) * routed_stride_);
    gated_ = memory.zeros<bf16>(choices * inner_stride_);
    if (kWidens) widened_ = memory.zeros<float>(choices * inner_stride_);
    given_ = memory.zeros<bf16>(choices * padded(spec.hidden_size));
    choices_.reserve(choices);
    chosen_.reserve(size_t(spec.max_experts));
    of_row_.resize(choices);
    num_of_row_.resize(size_t(spec.max_rows));
    probabilities_.resize(size_t(spec.max_experts));
  }

  // The second sublayer, of rows that are arranged for the router.
  void compute(const Thread& thread, const Experts& experts, const Operand& x, int sublayer) {
    into_rows(thread, experts.router, x, routed_, routed_stride_);
    thread.barrier();
    if (thread.is_first()) choose(experts, thread.pass.call.num_rows);
    thread.barrier();
    gate_and_up(thread, experts, x);
    thread.count(kGateUp);
    thread.barrier();
    if constexpr (kWidens) {
      const Share mine = thread.share(int(choices_.size()));
      for (int at = mine.begin; at < mine.end; at++)
        widen(gated_ + at * inner_stride_, experts.intermediate, widened_ + at * inner_stride_);
      thread.barrier();
    }
    down(thread, experts);
    thread.count(kDown);
    thread.barrier();
    const Workspace& space = thread.pass.space;
    const Share rows = thread.share(thread.pass.call.num_rows);
    for (int row = rows.begin; row < rows.end; row++)
      combine(row, experts.top_k, space.hidden_stride,
              space.sublayers[sublayer] + row * space.hidden_stride);
    thread.count(kDown);
  }

 private:
  // A row with one of the experts that it chose. Sorted by expert, then by row.
  struct Choice {
    int expert, row;
    float weight;
  };

  // Of each row the experts with the highest probabilities, of equal ones the first. Takes no memory:
  // the other threads wait.
  void choose(const Experts& experts, int num_rows) {
    choices_.clear();
    float* p = probabilities_.data();
    for (int row = 0; row < num_rows; row++) {
      const bf16* logits = routed_ + row * routed_stride_;
      float highest = -INFINITY, sum = 0.f, together = 0.f;
      for (int e = 0; e < experts.num_experts; e++) highest = std::max(highest, one(logits[e]));
      for (int e = 0; e < experts.num_experts; e++) sum += p[e] = std::exp(one(logits[e]) - highest);
      const size_t first = choices_.size();
      for (int k = 0; k < experts.top_k; k++) {
        const int best = int(std::max_element(p, p + experts.num_experts) - p);
        choices_.push_back({best, row, p[best] / sum});
        together += choices_.back().weight;
        p[best] = -1.f;
      }
      for (size_t at = first; at < choices_.size(); at++) {
        float& weight = choices_[at].weight;
        if (experts.normalizes) weight /= together;
        if (experts.rounds_weights) weight = one(round_one(weight));
      }
    }
    std::sort(choices_.begin(), choices_.end(), [](const Choice& a, const Choice& b) {
      return a.expert != b.expert ? a.expert < b.expert : a.row < b.row;
    });
    chosen_.clear();
    std::fill(num_of_row_.begin(), num_of_row_.end(), 0);
    for (int at = 0; at < int(choices_.size()); at++) {
      const Choice& choice = choices_[size_t(at)];
      if (!at || choices_[size_t(at) - 1].expert != choice.expert) chosen_.push_back(at);
      const int number = num_of_row_[size_t(choice.row)]++;
      of_row_[size_t(choice.row * experts.top_k + number)] = at;
    }
  }

  // work(expert, chunk, first choice, end of its choices) for the chunks that this thread takes.
  template <class Work>
  void for_each_expert(const Thread& thread, int chunks, Work work) {
    const int num_experts = int(chosen_.size());
    for (int item; (item = thread.pass.threads.take(thread.index, chunks * num_experts)) >= 0;) {
      const int index = item / chunks, begin = chosen_[size_t(index)];
      const int end = index + 1 < num_experts ? chosen_[size_t(index) + 1] : int(choices_.size());
      work(choices_[size_t(begin)].expert, item % chunks, begin, end);
    }
  }

  void gate_and_up(const Thread& thread, const Experts& experts, const Operand& x) {
    const DecoderSpec& spec = thread.pass.spec;
    const int64_t width = spec.hidden_size, inner = experts.intermediate;
    Matrix gates[2]{{nullptr, nullptr, inner, kBf16}, {nullptr, nullptr, inner, kBf16}};
    Product product;
    Block<Vectors::Element> block;
    for_each_expert(
        thread, num_chunks_of(inner, kGroups), [&](int expert, int index, int begin, int end) {
          gates[0].weight = experts.gate_up + expert * 2 * inner * width;
          gates[1].weight = (const bf16*)gates[0].weight + inner * width;
          const Chunk chunk = gated_chunk_of(gates, index, cut_for_rows(end - begin));
          for (int at = begin; at < end; at += kRows) {
            block.num_rows = std::min(kRows, end - at);
            for (int m = 0; m < block.num_rows; m++)
              block.rows[m] = x.row(choices_[size_t(at + m)].row);
            Vectors::multiply(chunk, int(width), block, product);
            with_activation(spec.activation, [&](auto activation) {
              store_gated(chunk, product, block.num_rows, activation, gated_ + at * inner_stride_,
                          inner_stride_);
            });
          }
        });
  }

  void down(const Thread& thread, const Experts& experts) {
    const int64_t width = thread.pass.spec.hidden_size, inner = experts.intermediate;
    const int64_t stride = thread.pass.space.hidden_stride;
    Matrix down{nullptr, nullptr, width, kBf16};
    Product product;
    Block<Vectors::Element> block;
    for_each_expert(
        thread, num_chunks_of(width, kGroups), [&](int expert, int index, int begin, int end) {
          down.weight = experts.down + expert * inner * width;
          const Chunk chunk = chunk_of(down, index, 0, cut_for_rows(end - begin));
          for (int at = begin; at < end; at += kRows) {
            block.num_rows = std::min(kRows, end - at);
            for (int m = 0; m < block.num_rows; m++) block.rows[m] = gated_row(at + m);
            Vectors::multiply(chunk, int(inner), block, product);
            each_row(chunk, product, block.num_rows,
                     [&](int m, int output, int step, int count, F value) {
                       bf16* row = given_ + (at + m) * stride;
                       scatter16(row + output, step, value, count);
                     });
          }
        });
  }

  const Vectors::Element* gated_row(int choice) const {
    if constexpr (kWidens)
      return (const Vectors::Element*)(widened_ + choice * inner_stride_);
    else
      return (const Vectors::Element*)(gated_ + choice * inner_stride_);
  }

  // The sum of what a row's experts gave, in their order, rounded after each.
  void combine(int row, int top_k, int64_t stride, bf16* to) const {
    for (int k = 0; k < stride; k += kLanes) {
      F sum = splat(0.f);
      for (int i = 0; i < num_of_row_[size_t(row)]; i++) {
        const int at = of_row_[size_t(row * top_k + i)];
        const F part = load16(given_ + at * stride + k);
        sum = rounded(sum + rounded(part * splat(choices_[size_t(at)].weight)));
      }
      store16(to + k, sum);
    }
  }

  const int64_t routed_stride_, inner_stride_;
  bf16* routed_ = nullptr;  // a row's logits of all experts
  // Of each choice: gate and up, the same widened, and what the expert gives.
  bf16* gated_ = nullptr;
  float* widened_ = nullptr;
  bf16* given_ = nullptr;
  std::vector<Choice> choices_;
  std::vector<int> chosen_;               // the first choice of each expert that was chosen
  std::vector<int> of_row_, num_of_row_;  // each row's choices, [row][top_k]
  std::vector<float> probabilities_;
};

}  // namespace
