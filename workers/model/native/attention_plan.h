// Which tasks attention is cut into in a pass: their columns, heads and partitions.
//
// Made once a pass by one thread, read by all. Invariants: it depends on the call's rows and on the
// number of threads, and a column's result on neither (attention.h); no plan needs more than
// `num_slots` places for partial results.
#pragma once
#include <algorithm>
#include <vector>

#include "description.h"
#include "instruction_set.h"

namespace {

// Tasks of attention that a thread should have to choose from. On tiles each arranges keys for itself.
constexpr int kTasksEach = kHasTiles ? 4 : 8;

// Only a run with more than 1 / max_split_runs() of all keys is split.
inline int max_split_runs(const DecoderSpec& spec) { return 2 * spec.num_threads; }

// Partial results that a decoder needs room for, of one key head with up to 16 columns each.
inline int64_t num_slots(const DecoderSpec& spec) {
  const int64_t partitions = (spec.max_model_len + kPartition - 1) / kPartition;
  return max_split_runs(spec) * partitions * spec.max_kv_heads;
}

// Whether a row is the next token of the sequence whose token the row before it is.
inline bool goes_on(const Call& call, int row) {
  return call.tables[row - 1] == call.tables[row] &&
         call.positions[row - 1] + 1 == call.positions[row];
}

// Layers with the same tasks.
struct Kind {
  int window, num_heads, num_kv_heads, sees_all;
  std::vector<Task> tasks;
  std::vector<Task> merges;  // one for a split task, with the number of its partitions

  bool is_of(const Attention& a) const {
    return window == a.window && num_heads == a.num_heads && num_kv_heads == a.num_kv_heads &&
           sees_all == a.sees_all;
  }
  int first_key(int position) const { return window ? std::max(0, position - window + 1) : 0; }
};

// A section that a call completes.
struct Completed {
  int run, section;
};

class AttentionPlan {
 public:
  void make(const DecoderSpec& spec, const Call& call, int num_threads) {
    find_runs(call);
    kinds_.clear();
    kind_of_.resize(size_t(call.num_layers));
    for (int i = 0; i < call.num_layers; i++) {
      const Attention& a = call.layers[i].attention;
      size_t kind = 0;
      while (kind < kinds_.size() && !kinds_[kind].is_of(a)) kind++;
      if (kind == kinds_.size()) {
        kinds_.push_back({a.window, a.num_heads, a.num_kv_heads, a.sees_all, {}, {}});
        cut(kinds_.back(), a, num_threads, max_split_runs(spec));
      }
      kind_of_[size_t(i)] = int(kind);
    }
  }

  const Run& run(const Task& task) const { return runs_[size_t(task.run)]; }
  const Run& run_of_row(int row) const { return runs_[size_t(run_of_row_[size_t(row)])]; }
  const Run& run(const Completed& one) const { return runs_[size_t(one.run)]; }
  const std::vector<Completed>& completed() const { return completed_; }
  // Of the call's layer of that number.
  const Kind& kind(int layer) const { return kinds_[size_t(kind_of_[size_t(layer)])]; }

 private:
  void find_runs(const Call& call) {
    runs_.clear();
    run_of_row_.resize(size_t(call.num_rows));
    for (int row = 0; row < call.num_rows; row++) {
      if (row && goes_on(call, row))
        runs_.back().num_rows++;
      else
        runs_.push_back({row, 1, call.positions[row],
                         call.addresses + int64_t(call.tables[row]) * call.max_blocks, nullptr, 0,
                         0});
      run_of_row_[size_t(row)] = int(runs_.size()) - 1;
    }
    completed_.clear();
    if (call.open_blocks) find_sections(call);
  }

  void find_sections(const Call& call) {
    int fresh = 0;
    for (int r = 0; r < int(runs_.size()); r++) {
      Run& run = runs_[size_t(r)];
      run.num_open = call.num_open_blocks;
      run.open = call.open_blocks + int64_t(call.tables[run.row]) * 2 * run.num_open;
      run.fresh = fresh;
      fresh += run.num_fresh();
      const int end = (run.position + run.num_rows) / kSection;
      for (int section = run.position / kSection; section < end; section++)
        completed_.push_back({r, section});
    }
  }

  void cut(Kind& kind, const Attention& a, int num_threads, int max_split) {
    const int group = kind.num_heads / kind.num_kv_heads;
    int64_t num_keys = 0, num_tiles = 0;
    for (const Run& run : runs_) {
      num_keys += run.position + 1 - kind.first_key(run.position);
      num_tiles += (run.num_rows * group + kRows - 1) / kRows * int64_t(kind.num_kv_heads);
    }
    const int64_t wanted = kTasksEach * int64_t(num_threads);
    const int most = int(std::clamp<int64_t>(num_tiles / wanted, 1, kTiles));
    int slot = 0;
    for (int r = 0; r < int(runs_.size()); r++) {
      const Run& run = runs_[size_t(r)];
      const int count = run.num_rows * group;
      const int tiles = std::min((count + kRows - 1) / kRows, most);
      // Heads lie beside each other: reading several together goes faster.
      const int heads = tiles > 1 ? 1 : std::min(kind.num_kv_heads, kTiles);
      for (int column = 0; column < count; column += tiles * kRows)
        for (int head = 0; head < kind.num_kv_heads; head += heads) {
          const int num_columns = std::min(tiles * kRows, count - column);
          const int num_heads = std::min(heads, kind.num_kv_heads - head);
          Task task{r, head, num_heads, column, num_columns, -1, slot};
          const int first = kind.first_key(run.position + column / group) / kPartition;
          const int last =
              run.last_seen(a, run.position + (column + num_columns - 1) / group) / kPartition;
          const int64_t own = run.position + 1 - kind.first_key(run.position);
          if (count > kRows || first == last || own * max_split < num_keys || num_threads == 1) {
            kind.tasks.push_back(task);
            continue;
          }
          task.partition = last - first + 1;
          kind.merges.push_back(task);
          for (int p = first; p <= last; p++, slot += num_heads) {
            task.partition = p;
            task.slot = slot;
            kind.tasks.push_back(task);
          }
        }
    }
    // The longest first.
    const auto cost = [&](const Task& task) {
      const Run& of = run(task);
      const int last = of.last_seen(a, of.position + (task.column + task.num_columns - 1) / group);
      const int64_t keys = task.partition < 0
                               ? last + 1 - kind.first_key(last)
                               : std::min(kPartition, last + 1 - task.partition * kPartition);
      return keys * ((task.num_columns + kRows - 1) / kRows) * task.num_kv_heads;
    };
    std::stable_sort(kind.tasks.begin(), kind.tasks.end(),
                     [&](const Task& a, const Task& b) { return cost(a) > cost(b); });
  }

  std::vector<Run> runs_;
  std::vector<Kind> kinds_;
  std::vector<int> kind_of_;
  std::vector<int> run_of_row_;
  std::vector<Completed> completed_;
};

}  // namespace
