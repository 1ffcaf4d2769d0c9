// One pass over some layers, as a thread that takes part in it sees it.
//
// Owns what all operations have in common: which rows are a thread's, when all wait for all, and what
// the first thread's time is spent on. A call of up to 16 rows is one block: each thread then norms
// it for itself, which costs less than passing it around. More rows are shared out. Knows no
// operation.
#pragma once
#include "threads.h"
#include "workspace.h"

namespace {

// Operations whose time is counted.
enum Timed { kNorm, kQkv, kRotate, kAttend, kOutput, kGateUp, kDown, kLogits, kWait, kNumTimed };

class Clock {
 public:
  void start() { since_ = ticks(); }
  // The time since the last call goes to `operation`.
  void count(Timed operation) {
    const uint64_t now = ticks();
    counted_[operation] += now - since_;
    since_ = now;
  }
  uint64_t counted(int operation) const { return counted_[operation]; }

 private:
  uint64_t since_ = 0, counted_[kNumTimed] = {};
};

class Mixture;

struct Pass {
  const DecoderSpec& spec;
  const Call& call;
  Workspace& space;
  const AttentionPlan& plan;
  Mixture& mixture;
  Threads& threads;
  Clock& clock;

  bool alone() const { return call.num_rows <= kRows; }
  int num_blocks() const { return (call.num_rows + kRows - 1) / kRows; }
  int rows_of(int block) const { return std::min(kRows, call.num_rows - block * kRows); }
};

// Numbers from `begin` to before `end`.
struct Share {
  int begin, end;
};

// One of the threads.
struct Thread {
  const Pass& pass;
  const int index;
  Workspace::Own& own;

  Thread(const Pass& pass, int index)
      : pass(pass), index(index), own(pass.space.own[size_t(index)]) {}

  bool is_first() const { return index == 0; }
  void count(Timed operation) const {
    if (is_first()) pass.clock.count(operation);
  }
  void barrier() const {
    pass.threads.barrier();
    count(kWait);
  }

  Share share(int num) const {
    return {pass.threads.share(index, num), pass.threads.share(index + 1, num)};
  }
  // Rows of `num` that it arranges where they are shared out: whole blocks.
  Share share_of_blocks(int num) const {
    const Share blocks = share((num + kRows - 1) / kRows);
    return {blocks.begin * kRows, std::min(num, blocks.end * kRows)};
  }
  // Rows that it norms and arranges itself: all where there are few, or its share, in blocks.
  Share rows() const {
    return pass.alone() ? Share{0, pass.call.num_rows} : share_of_blocks(pass.call.num_rows);
  }
  // Where these rows lie.
  bf16* hidden() const { return pass.alone() ? own.hidden : pass.space.hidden; }
  bf16* normed() const { return pass.alone() ? own.normed : pass.space.normed; }

  // Rows as products with `linear` take them. Of more than a block each thread arranges the rows that
  // it has, and all wait for all.
  Operand arranged(const bf16* from, int64_t stride, const Linear& linear) const {
    const Operand operand(from, stride, linear, pass.alone() ? own.forms : pass.space.forms);
    const Share mine = rows();
    operand.arrange(mine.begin, mine.end);
    count(kNorm);
    if (!pass.alone()) barrier();
    return operand;
  }
};

}  // namespace
