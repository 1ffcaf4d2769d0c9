// Some layers of a decoder on the shared weights, and embedding and logits where they are among them.
//
// The caller (decoder.py) checks every index and keeps every pointer alive; nothing is checked here.
// Invariant: weights are read where they lie and never written or repacked, and a row's result
// depends neither on the other rows of the call nor on the number of threads.
//
// A call of up to 16 rows is one block: each thread then norms it for itself, which costs less than
// passing it around. More rows are shared out.
#include <algorithm>
#include <cmath>
#include <new>
#include <vector>

#include "packed.h"
#include "paired.h"
#include "threads.h"
#if defined(__AVX512BF16__)
#include "pairs.h"
#include "pairs_attention.h"
using Vectors = Pairs;
using VectorsAttention = PairsAttention;
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#include "pairs_attention.h"
#include "squares.h"
using Vectors = Squares;
using VectorsAttention = PairsAttention;
#else
#include "floats.h"
using Vectors = Floats;
using VectorsAttention = FloatsAttention;
#endif
#if defined(SET_AMX)
#include "tiles.h"
#endif

namespace {

#if defined(SET_AMX)
constexpr bool kHasTiles = true;
#else
constexpr bool kHasTiles = false;
#endif
constexpr bool kWidens = sizeof(Vectors::Element) == 4;

// Operations whose time is counted.
enum Timed { kNorm, kQkv, kRotate, kAttend, kOutput, kGateUp, kDown, kLogits, kWait, kNumTimed };

// Tasks of attention that a thread should have to choose from. On tiles each arranges keys for itself.
constexpr int kTasksEach = kHasTiles ? 4 : 8;

}  // namespace

extern "C" {

// How a layer's two sublayers join the residual stream.
enum Residual : int32_t {
  kOneByOne = 0,       // x += attention(x); x += mlp(x)
  kTogether = 1,       // x += attention(x) + mlp(x)
  kOneAfterOther = 2,  // x = (x + attention(x)) + mlp(x), both of the same x
  kNormedSums = 3,     // x = norm(x + attention(x)); x = norm(x + mlp(x))
};

// A mixture of experts in the MLP's place. `gate_up` is [num_experts, 2 * intermediate, hidden], gate
// rows first, `down` [num_experts, hidden, intermediate].
struct Experts {
  Linear router;
  const bf16 *gate_up, *down;
  int32_t num_experts;  // 0: none
  int32_t top_k, intermediate;
  int32_t normalizes;    // the weights of those chosen add up to 1
  int32_t rounds_weights;  // to bf16, before they are used
};

struct LayerSpec {
  Linear qkv, output, gate_up, down;  // gate_up: one matrix where the MLP has no gate
  Norm input_norm, attention_norm, mlp_norm, mlp_output_norm, query_norm, key_norm;
  Attention attention;
  int32_t rope;            // which of the tables, or -1
  int32_t norms_all_heads;  // query_norm and key_norm are over all heads together
  int32_t residual;
  Experts experts;
};

// Where a sublayer's result is the sum of what several ranks compute, each on columns of its own:
// functions of all_reduce.cpp. A sum is a round: parts are written, published, waited for, read.
struct Outcome {
  int64_t result, rank;  // 0: done
};
struct Ranks {
  void* group;  // null: there are no others
  float* (*own_part)(void* group);
  const float* (*part_of)(void* group, int32_t rank);
  void (*publish)(void* group);
  void (*wait)(void* group, int64_t timeout_ns, Outcome* outcome);
  int64_t timeout_ns;
  int32_t num_ranks;
};

struct DecoderSpec {
  int32_t hidden_size, intermediate_size, activation;
  int32_t packs;  // some matrix is packed
  Matrix embedding;
  float embedding_scale;  // 0: none
  const bf16* type_embedding;      // added to each row; or null
  const bf16* position_embedding;  // that of position 0, added to it; or null
  Norm embedding_norm;
  float residual_scale;   // of what a sublayer gives; 1: none
  Norm final_norm;
  Linear head;
  float logit_scale;    // 1: none
  float logit_softcap;  // 0: none
  const float* rope_cos[2];  // [max_model_len, rotary_dim / 2], and a vector more
  const float* rope_sin[2];
  int32_t rotary_dim, rotation, max_rows, max_model_len, num_threads;
  int32_t max_outputs, max_attended, max_head_dim, max_kv_heads;  // of any layer
  int32_t max_experts, max_top_k, expert_intermediate;            // likewise
  Ranks ranks;
};

struct Call {
  const LayerSpec* layers;  // those to compute, one after the other
  const int32_t* token_ids;  // or null: `hidden` holds what comes in
  const int32_t* positions;
  const int32_t* tables;
  const int64_t* addresses;
  const int32_t* logit_rows;
  bf16* hidden;      // the residual stream, [num_rows][padded(hidden_size)]; or null
  float* logits;     // [num_logit_rows][vocab size]
  int32_t num_layers, num_rows, max_blocks, num_logit_rows, num_threads;
  int32_t norms_hidden;  // what goes out as `hidden` is the final norm's
  Outcome outcome;       // of the ranks' sums: the first error
};

}  // extern "C"

namespace {

template <class T>
T* aligned(size_t count, size_t& bytes) {
  const size_t size = (count * sizeof(T) + 63) / 64 * 64;
  bytes += size;
  void* memory = operator new(size, std::align_val_t(64));
  return static_cast<T*>(memory);
}

// Zeros, so that padding is.
template <class T>
T* zeros(size_t count, size_t& bytes) {
  T* memory = aligned<T>(count, bytes);
  memset((void*)memory, 0, count * sizeof(T));
  return memory;
}

// Rows of activations in bf16, and in the form that products take them in.
struct Operand {
  const bf16* rows;
  int64_t stride;
  int width;
  float* widened = nullptr;    // [num_rows][padded(width)]
  bf16* paired = nullptr;      // blocks of 16 rows
  char* shortened = nullptr;  // rows in 8 bits

  const Vectors::Element* row(int index) const {
    if constexpr (kWidens)
      return (const Vectors::Element*)(widened + int64_t(index) * padded(width));
    else
      return (const Vectors::Element*)(rows + index * stride);
  }
  void block(int first, int num_rows, Block<Vectors::Element>& to) const {
    to.num_rows = num_rows;
    for (int m = 0; m < num_rows; m++) to.rows[m] = row(first + m);
    to.paired = paired ? paired + int64_t(first) * padded(width) : nullptr;
  }
  char* shortened_row(int index) const { return shortened + index * Shortened::bytes(width); }
  void block(int first, int num_rows, ShortBlock& to) const {
    to.num_rows = num_rows;
    for (int m = 0; m < num_rows; m++) to.rows[m] = Shortened(shortened_row(first + m), width);
  }
};

class Decoder {
 public:
  explicit Decoder(const DecoderSpec& spec) : spec_(spec), threads_(new Threads(spec.num_threads)) {
    const int rows = (spec.max_rows + kRows - 1) / kRows * kRows;
    hidden_stride_ = padded(spec.hidden_size);
    projected_stride_ = padded(spec.max_outputs);
    attended_stride_ = padded(spec.max_attended);
    gated_stride_ = padded(spec.intermediate_size);
    const int64_t widest = std::max({hidden_stride_, attended_stride_, gated_stride_});
    hidden_ = zeros<bf16>(size_t(rows) * hidden_stride_, bytes_);
    normed_ = zeros<bf16>(size_t(rows) * hidden_stride_, bytes_);
    for (bf16*& one : sublayers_) one = zeros<bf16>(size_t(rows) * hidden_stride_, bytes_);
    projected_ = zeros<bf16>(size_t(rows) * projected_stride_, bytes_);
    attended_ = zeros<bf16>(size_t(rows) * attended_stride_, bytes_);
    gated_ = zeros<bf16>(size_t(rows) * gated_stride_, bytes_);
    if (spec.max_experts) {
      const size_t choices = size_t(spec.max_rows) * spec.max_top_k;
      routed_stride_ = padded(spec.max_experts);
      inner_stride_ = padded(spec.expert_intermediate);
      routed_ = zeros<bf16>(size_t(rows) * routed_stride_, bytes_);
      expert_gated_ = zeros<bf16>(choices * inner_stride_, bytes_);
      if (kWidens) expert_widened_ = zeros<float>(choices * inner_stride_, bytes_);
      expert_out_ = zeros<bf16>(choices * hidden_stride_, bytes_);
      choices_.reserve(choices);
      experts_.reserve(size_t(spec.max_experts));
      of_row_.resize(choices);
      num_of_row_.resize(size_t(spec.max_rows));
      probabilities_.resize(size_t(spec.max_experts));
    }
    if (kWidens) widened_ = zeros<float>(size_t(rows) * widest, bytes_);
    if (kHasTiles) paired_ = zeros<bf16>(size_t(rows) * widest, bytes_);
    if (spec.packs) shortened_ = zeros<char>(size_t(rows) * Shortened::bytes(int(widest)), bytes_);
    own_.resize(size_t(spec.num_threads));
    for (Own& own : own_) {
      own.hidden = zeros<bf16>(size_t(kRows) * hidden_stride_, bytes_);
      own.normed = zeros<bf16>(size_t(kRows) * hidden_stride_, bytes_);
      if (kWidens) own.widened = zeros<float>(size_t(kRows) * widest, bytes_);
      if (kHasTiles) own.paired = zeros<bf16>(size_t(kRows) * widest, bytes_);
      if (spec.packs)
        own.shortened = zeros<char>(size_t(kRows) * Shortened::bytes(int(widest)), bytes_);
      own.row = zeros<bf16>(size_t(std::max(projected_stride_, hidden_stride_)), bytes_);
      own.scratch = zeros<AttentionScratch<VectorsAttention>>(1, bytes_);
#if defined(SET_AMX)
      own.tiles_scratch = zeros<AttentionScratch<TilesAttention>>(1, bytes_);
#endif
    }
    // Only a run with more than 1 / max_split_runs() of all keys is split.
    const int64_t partitions = (spec.max_model_len + kPartition - 1) / kPartition;
    partials_ = aligned<float>(size_t(max_split_runs() * partitions * spec.max_kv_heads *
                                      partial_size(spec.max_head_dim)),
                               bytes_);
  }

  ~Decoder() {
    if (threads_->of_this_process()) {
      threads_->stop();
      delete threads_;
    }
    for (void* p : {(void*)hidden_, (void*)normed_, (void*)sublayers_[0], (void*)sublayers_[1],
                    (void*)projected_, (void*)attended_, (void*)gated_, (void*)widened_,
                    (void*)paired_, (void*)partials_, (void*)routed_, (void*)expert_gated_,
                    (void*)expert_widened_, (void*)expert_out_, (void*)shortened_})
      release(p);
    for (Own& own : own_)
      for (void* p : {(void*)own.hidden, (void*)own.normed, (void*)own.widened, (void*)own.paired,
                      (void*)own.row, (void*)own.scratch, (void*)own.shortened,
                      own.tiles_scratch_at()})
        release(p);
  }

  bool forward(Call& call) {
    // In a forked child the parent's threads don't exist, and their words may be in any state.
    if (!threads_->of_this_process()) threads_ = new Threads(spec_.num_threads);
    threads_->use(call.num_threads);
    call_ = &call;
    plan_attention();
    for (Own& own : own_) own.outcome = {};
    if (!threads_->run([](void* self, int thread) { ((Decoder*)self)->step(thread); }, this))
      return false;
    call.outcome = {};
    for (const Own& own : own_)
      if (!call.outcome.result) call.outcome = own.outcome;
    return true;
  }

  int64_t hidden_stride() const { return hidden_stride_; }
  size_t workspace_bytes() const { return bytes_; }
  uint64_t counted(int operation) const { return counted_[operation]; }

 private:
  struct Own {
    bf16 *hidden = nullptr, *normed = nullptr, *paired = nullptr, *row = nullptr;
    float* widened = nullptr;
    char* shortened = nullptr;
    Outcome outcome{};
    AttentionScratch<VectorsAttention>* scratch = nullptr;
#if defined(SET_AMX)
    AttentionScratch<TilesAttention>* tiles_scratch = nullptr;
    void* tiles_scratch_at() const { return tiles_scratch; }
#else
    void* tiles_scratch_at() const { return nullptr; }
#endif
  };

  static void release(void* p) {
    if (p) operator delete(p, std::align_val_t(64));
  }

  bool alone() const { return call_->num_rows <= kRows; }
  int num_blocks() const { return (call_->num_rows + kRows - 1) / kRows; }
  int rows_of(int block) const { return std::min(kRows, call_->num_rows - block * kRows); }

  // --- attention's plan

  void plan_attention() {
    const Call& call = *call_;
    runs_.clear();
    for (int row = 0; row < call.num_rows; row++) {
      if (!runs_.empty()) {
        Run& run = runs_.back();
        const int previous = row - 1;
        if (call.tables[previous] == call.tables[row] &&
            call.positions[previous] + 1 == call.positions[row]) {
          run.num_rows++;
          continue;
        }
      }
      runs_.push_back({row, 1, call.positions[row],
                       call.addresses + int64_t(call.tables[row]) * call.max_blocks});
    }
    kinds_.clear();
    kind_of_.resize(size_t(call.num_layers));
    for (int i = 0; i < call.num_layers; i++) {
      const Attention& a = call.layers[i].attention;
      size_t kind = 0;
      while (kind < kinds_.size() &&
             !(kinds_[kind].window == a.window && kinds_[kind].num_heads == a.num_heads &&
               kinds_[kind].num_kv_heads == a.num_kv_heads && kinds_[kind].sees_all == a.sees_all))
        kind++;
      if (kind == kinds_.size()) {
        kinds_.push_back({a.window, a.num_heads, a.num_kv_heads, a.sees_all, {}, {}});
        plan_kind(kinds_.back(), a);
      }
      kind_of_[size_t(i)] = int(kind);
    }
  }

  struct Kind {  // layers with the same tasks
    int window, num_heads, num_kv_heads, sees_all;
    std::vector<Task> tasks;
    std::vector<Task> merges;  // one for a split task, with the number of its partitions
  };

  int max_split_runs() const { return 2 * spec_.num_threads; }

  void plan_kind(Kind& kind, const Attention& a) {
    const int group = kind.num_heads / kind.num_kv_heads;
    const auto first_key = [&](int position) {
      return kind.window ? std::max(0, position - kind.window + 1) : 0;
    };
    int64_t num_keys = 0, num_tiles = 0;
    for (const Run& run : runs_) {
      num_keys += run.position + 1 - first_key(run.position);
      num_tiles += (run.num_rows * group + kRows - 1) / kRows * int64_t(kind.num_kv_heads);
    }
    const int64_t wanted = kTasksEach * int64_t(threads_->count());
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
          const int first = first_key(run.position + column / group) / kPartition;
          const int last =
              run.last_seen(a, run.position + (column + num_columns - 1) / group) / kPartition;
          const int64_t own = run.position + 1 - first_key(run.position);
          if (count > kRows || first == last || own * max_split_runs() < num_keys ||
              threads_->count() == 1) {
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
      const Run& run = runs_[size_t(task.run)];
      const int last =
          run.last_seen(a, run.position + (task.column + task.num_columns - 1) / group);
      const int64_t keys = task.partition < 0
                               ? last + 1 - first_key(last)
                               : std::min(kPartition, last + 1 - task.partition * kPartition);
      return keys * ((task.num_columns + kRows - 1) / kRows) * task.num_kv_heads;
    };
    std::stable_sort(kind.tasks.begin(), kind.tasks.end(),
                     [&](const Task& a, const Task& b) { return cost(a) > cost(b); });
  }

  // --- time

  // Thread 0's time since the last call goes to `operation`.
  void count(int thread, Timed operation) {
    if (thread) return;
    const uint64_t now = ticks();
    counted_[operation] += now - since_;
    since_ = now;
  }
  void barrier(int thread) {
    threads_->barrier();
    count(thread, kWait);
  }

  // --- one step

  void step(int thread) {
    const FlushDenormals flush;
#if defined(SET_AMX)
    static const TileConfig config;
    _tile_loadconfig(&config);
#endif
    if (thread == 0) since_ = ticks();
    begin(thread);
    const LayerSpec* previous = nullptr;
    for (int i = 0; i < call_->num_layers; i++) {
      const LayerSpec& layer = call_->layers[i];
      join(thread, previous);
      const bf16* x = norm(thread, layer.input_norm);
      project(thread, layer, arranged(thread, x, hidden_stride_, layer.qkv));
      barrier(thread);
      rotate_and_keep(thread, layer);
      barrier(thread);
      attend(thread, layer, kinds_[size_t(kind_of_[size_t(i)])]);
      barrier(thread);
      to_sublayer(thread, layer.output,
                  arranged(thread, attended_, attended_stride_, layer.output), 0);
      count(thread, kOutput);
      const bool one_by_one = layer.residual == kOneByOne || layer.residual == kNormedSums;
      if (one_by_one) {
        barrier(thread);
        if (layer.residual == kNormedSums)
          add_and_norm(thread, layer.attention_norm);
        else
          add(thread, 0, layer.attention_norm);
        x = norm(thread, layer.mlp_norm);
      } else {
        barrier(thread);  // of one operation's chunks before another's
        if (layer.mlp_norm.kind != kNoNorm) x = norm(thread, layer.mlp_norm);
      }
      const Linear& first = layer.experts.num_experts ? layer.experts.router : layer.gate_up;
      const Operand normed = arranged(thread, x, hidden_stride_, first);
      const int sublayer = one_by_one ? 0 : 1;
      if (layer.experts.num_experts) {
        mix_experts(thread, layer.experts, normed, sublayer);
      } else {
        gate_up(thread, layer, normed);
        count(thread, kGateUp);
        barrier(thread);
        to_sublayer(thread, layer.down,
                    arranged(thread, gated_, gated_stride_, layer.down), sublayer);
        count(thread, kDown);
      }
      barrier(thread);
      previous = &layer;
    }
    join(thread, previous);
    end(thread);
#if defined(SET_AMX)
    _tile_release();
#endif
  }

  // Rows that a thread norms and arranges itself: all where there are few, or its share, in blocks.
  int first_row(int thread) const {
    return alone() ? 0 : threads_->share(thread, num_blocks()) * kRows;
  }
  int end_row(int thread) const {
    if (alone()) return call_->num_rows;
    return std::min(call_->num_rows, threads_->share(thread + 1, num_blocks()) * kRows);
  }
  bf16* hidden_at(int thread) { return alone() ? own_[size_t(thread)].hidden : hidden_; }
  bf16* normed_at(int thread) { return alone() ? own_[size_t(thread)].normed : normed_; }

  // The residual stream: embedded, or as an earlier call left it.
  void begin(int thread) {
    const int size = spec_.hidden_size;
    bf16* hidden = hidden_at(thread);
    for (int row = first_row(thread); row < end_row(thread); row++) {
      bf16* to = hidden + row * hidden_stride_;
      if (!call_->token_ids) {
        memcpy(to, call_->hidden + row * hidden_stride_, size_t(hidden_stride_) * 2);
        continue;
      }
      const int64_t token = call_->token_ids[row];
      if (is_packed(spec_.embedding))
        unpack_row(spec_.embedding, size, token, to);
      else
        memcpy(to, (const bf16*)spec_.embedding.weight + token * size, size_t(size) * 2);
      if (spec_.embedding_scale != 0)
        for (int k = 0; k < size; k += kLanes)
          store16(to + k, load16(to + k) * splat(spec_.embedding_scale));
      if (spec_.type_embedding) add_to_row(to, spec_.type_embedding);
      if (spec_.position_embedding)
        add_to_row(to, spec_.position_embedding + int64_t(call_->positions[row]) * size);
      if (spec_.embedding_norm.kind != kNoNorm) norm_into(to, size, spec_.embedding_norm, to);
    }
  }

  // `more` has no zeros behind it.
  void add_to_row(bf16* row, const bf16* more) {
    const int size = spec_.hidden_size;
    for (int k = 0; k < size; k += kLanes)
      store16(row + k, load16(row + k) + load16(more + k, size - k));
  }

  // Add what the last layer's sublayers gave, as far as that has not been done.
  void join(int thread, const LayerSpec* layer) {
    if (!layer) return;
    if (layer->residual == kOneByOne) return add(thread, 0, layer->mlp_output_norm);
    if (layer->residual == kNormedSums) return add_and_norm(thread, layer->mlp_output_norm);
    const Norm none{};
    if (layer->residual == kTogether)
      for (int row = first_row(thread); row < end_row(thread); row++) {
        bf16* first = sublayers_[0] + row * hidden_stride_;
        const bf16* second = sublayers_[1] + row * hidden_stride_;
        bf16* hidden = hidden_at(thread) + row * hidden_stride_;
        for (int k = 0; k < hidden_stride_; k += kLanes) {
          const F both = rounded(load16(first + k) + load16(second + k));
          store16(hidden + k, load16(hidden + k) + both);
        }
      }
    else
      for (int i = 0; i < 2; i++) add(thread, i, none);
    count(thread, kNorm);
  }

  void add(int thread, int sublayer, const Norm& norm) {
    for (int row = first_row(thread); row < end_row(thread); row++)
      add_into(hidden_at(thread) + row * hidden_stride_,
               sublayers_[sublayer] + row * hidden_stride_, spec_.hidden_size, norm,
               spec_.residual_scale);
    count(thread, kNorm);
  }

  void add_and_norm(int thread, const Norm& norm) {
    const int size = spec_.hidden_size;
    for (int row = first_row(thread); row < end_row(thread); row++) {
      bf16* hidden = hidden_at(thread) + row * hidden_stride_;
      add_to_row(hidden, sublayers_[0] + row * hidden_stride_);
      norm_into(hidden, size, norm, hidden);
    }
    count(thread, kNorm);
  }

  // What goes into the next sublayer: the thread's own rows of it are there.
  const bf16* norm(int thread, const Norm& norm) {
    if (norm.kind == kNoNorm) return hidden_at(thread);
    for (int row = first_row(thread); row < end_row(thread); row++)
      norm_into(hidden_at(thread) + row * hidden_stride_, spec_.hidden_size, norm,
                normed_at(thread) + row * hidden_stride_);
    count(thread, kNorm);
    return normed_at(thread);
  }

  // Rows as products with `linear` take them. Of more than a block each thread arranges the rows that
  // it has, and all wait for all.
  Operand arranged(int thread, const bf16* rows, int64_t stride, const Linear& linear) {
    Own& own = own_[size_t(thread)];
    const int width = linear.width;
    Operand operand{rows, stride, width};
    const int begin = first_row(thread), end = end_row(thread);
    if (any_packed(linear)) {
      operand.shortened = alone() ? own.shortened : shortened_;
      for (int row = begin; row < end; row++)
        shorten(rows + row * stride, width, operand.shortened_row(row));
    }
    if constexpr (kWidens) {
      operand.widened = alone() ? own.widened : widened_;
      for (int row = begin; row < end; row++)
        widen(rows + row * stride, width, operand.widened + int64_t(row) * padded(width));
    }
    if (kHasTiles) {
      operand.paired = alone() ? own.paired : paired_;
      for (int row = begin; row < end; row += kRows) {
        const bf16* block[kRows] = {};
        for (int m = 0; m < kRows && row + m < end; m++) block[m] = rows + (row + m) * stride;
        pair_rows(block, width, operand.paired + int64_t(row) * padded(width));
      }
    }
    count(thread, kNorm);
    if (!alone()) barrier(thread);
    return operand;
  }

  static void widen(const bf16* from, int width, float* to) {
    for (int k = 0; k < padded(width); k += kLanes) store(to + k, load16(from + k));
  }

  // Rows up to which memory is the limit.
  static constexpr int kFew = 4;

  static Cut cut_for(const Linear& linear, int num_rows) {
    if (any_packed(linear)) return kGroups;
#if defined(SET_AMX)
    for (int i = 0; i < linear.num_matrices; i++)
      if (Tiles::takes(linear.matrices[i], linear.width)) return kDoubles;
#endif
    return num_rows <= kFew ? kBands : kGroups;
  }

  // Calls out(chunk, block, product) for each chunk that this thread takes and each block.
  template <class Out>
  void multiply(int thread, const Linear& linear, const Operand& x, int num_rows, Out out) {
    const Cut cut = cut_for(linear, num_rows);
    multiply(thread, linear.width, num_chunks(linear, cut), x, num_rows,
             [&](int index) { return chunk_of(linear, index, cut); }, out);
  }
  template <class ChunkAt, class Out>
  void multiply(int thread, int width, int chunks, const Operand& x, int num_rows, ChunkAt chunk_at,
                Out out) {
    Product products[2];
    const int blocks = (num_rows + kRows - 1) / kRows;
    for (int index; (index = threads_->take(thread, chunks)) >= 0;) {
      const Chunk chunk = chunk_at(index);
      for (int b = 0; b < blocks;) {
#if defined(SET_AMX)
        if (tiled(chunk, width)) {
          const bf16* paired[2];
          int counts[2];
          const int together = std::min(2, blocks - b);
          for (int i = 0; i < together; i++) {
            paired[i] = x.paired + int64_t(b + i) * kRows * padded(x.width);
            counts[i] = std::min(kRows, num_rows - (b + i) * kRows);
          }
          if (together == 2)
            Tiles::multiply<2>(chunk, width, paired, counts, products);
          else
            Tiles::multiply<1>(chunk, width, paired, counts, products);
          for (int i = 0; i < together; i++) out(chunk, b + i, products[i]);
          b += together;
          continue;
        }
#endif
        multiply_rows(chunk, width, x, b * kRows, std::min(kRows, num_rows - b * kRows), products[0]);
        out(chunk, b, products[0]);
        b++;
      }
    }
  }

  // Rows of x from `row` on. A chunk's groups may be of matrices in different formats.
  static void multiply_rows(const Chunk& chunk, int width, const Operand& x, int row, int num_rows,
                            Product& product) {
    int num_packed = 0;
    for (int g = 0; g < chunk.num_groups; g++) num_packed += is_packed(*chunk.groups[g].matrix);
    if (num_packed < chunk.num_groups) {
      Block<Vectors::Element> block;
      x.block(row, num_rows, block);
      if (!num_packed) return Vectors::multiply(chunk, width, block, product);
      multiply_plain(chunk, width, block, product);
    }
    ShortBlock block;
    x.block(row, num_rows, block);
    for (int g = 0; g < chunk.num_groups; g++)
      if (is_packed(*chunk.groups[g].matrix))
        Packed::multiply(chunk.groups[g], width, block, product.out[0] + g * kGroup);
  }

  // The groups of a chunk that are not packed.
  static void multiply_plain(const Chunk& chunk, int width, const Block<Vectors::Element>& block,
                             Product& product) {
    for (int g = 0; g < chunk.num_groups; g++) {
      if (is_packed(*chunk.groups[g].matrix)) continue;
      Product part;
      Vectors::multiply(Chunk{{chunk.groups[g]}, 1}, width, block, part);
      for (int m = 0; m < block.num_rows; m++)
        memcpy(product.out[m] + g * kGroup, part.out[m], kGroup * sizeof(float));
    }
  }

#if defined(SET_AMX)
  static bool tiled(const Chunk& chunk, int width) {
    for (int g = 0; g < chunk.num_groups; g++)
      if (!Tiles::takes(*chunk.groups[g].matrix, width)) return false;
    return true;
  }
#endif

  // Products as bf16 rows.
  void into_rows(int thread, const Linear& linear, const Operand& x, bf16* to, int64_t stride) {
    multiply(thread, linear, x, call_->num_rows,
             [&](const Chunk& chunk, int block, const Product& product) {
               each_row(chunk, product, rows_of(block),
                        [&](int m, int output, int step, int count, F value) {
                          bf16* row = to + (int64_t(block) * kRows + m) * stride;
                          scatter16(row + output, step, value, count);
                        });
             });
  }

  void project(int thread, const LayerSpec& layer, const Operand& x) {
    into_rows(thread, layer.qkv, x, projected_, projected_stride_);
    count(thread, kQkv);
  }

  void to_sublayer(int thread, const Linear& linear, const Operand& x, int sublayer) {
    if (spec_.ranks.group) return sum_to_sublayer(thread, linear, x, sublayer);
    into_rows(thread, linear, x, sublayers_[sublayer], hidden_stride_);
  }

  // After an error threads go on, so that all of them come to every barrier; the group then lets
  // nobody wait any more, and what is computed is of no use.
  void sum_to_sublayer(int thread, const Linear& linear, const Operand& x, int sublayer) {
    const Ranks& ranks = spec_.ranks;
    float* part = ranks.own_part(ranks.group);
    multiply(thread, linear, x, call_->num_rows,
             [&](const Chunk& chunk, int block, const Product& product) {
               each_row(chunk, product, rows_of(block),
                        [&](int m, int output, int step, int count, F value) {
                          alignas(64) float values[kLanes];
                          store(values, value);
                          float* row = part + (int64_t(block) * kRows + m) * hidden_stride_;
                          scatter(row + output, step, values, std::min(count, kLanes));
                        });
             });
    barrier(thread);
    if (thread == 0) ranks.publish(ranks.group);
    barrier(thread);
    Outcome& outcome = own_[size_t(thread)].outcome;
    if (!outcome.result) ranks.wait(ranks.group, ranks.timeout_ns, &outcome);
    const int size = spec_.hidden_size;
    const int end = threads_->share(thread + 1, call_->num_rows);
    for (int row = threads_->share(thread, call_->num_rows); row < end; row++) {
      const int64_t at = row * hidden_stride_;
      for (int k = 0; k < size; k += kLanes) {
        F sum = load(ranks.part_of(ranks.group, 0) + at + k);
        for (int rank = 1; rank < ranks.num_ranks; rank++)
          sum = sum + load(ranks.part_of(ranks.group, rank) + at + k);
        store16(sublayers_[sublayer] + at + k, sum, size - k);
      }
    }
  }

  // Norm and rotate the heads of queries and keys; put keys and values into the blocks.
  void rotate_and_keep(int thread, const LayerSpec& layer) {
    const Attention& a = layer.attention;
    const int units = a.num_heads + 2 * a.num_kv_heads;
    const int values_from = a.num_heads + a.num_kv_heads;
    const int half = spec_.rotary_dim / 2;
    bf16* scratch_row = own_[size_t(thread)].row;
    if (layer.norms_all_heads) {
      norm_all_heads(thread, layer);
      barrier(thread);
    }
    const int end = threads_->share(thread + 1, call_->num_rows * units);
    for (int unit = threads_->share(thread, call_->num_rows * units); unit < end; unit++) {
      const int row = unit / units, head = unit % units;
      const int position = call_->positions[row];
      bf16* x = projected_ + row * projected_stride_;
      if (head < a.num_heads)
        x += a.query + head * a.query_step;
      else if (head < values_from)
        x += a.key + (head - a.num_heads) * a.key_step;
      else
        x += a.value + (head - values_from) * a.value_step;
      if (head < values_from) {
        const Norm& norm = head < a.num_heads ? layer.query_norm : layer.key_norm;
        if (norm.kind != kNoNorm && !layer.norms_all_heads) norm_apart(x, a.head_dim, norm, scratch_row);
        if (layer.rope >= 0)
          rotate(x, spec_.rotary_dim, spec_.rope_cos[layer.rope] + int64_t(position) * half,
                 spec_.rope_sin[layer.rope] + int64_t(position) * half, spec_.rotation);
      }
      if (head >= a.num_heads) {
        const int64_t* blocks = call_->addresses + int64_t(call_->tables[row]) * call_->max_blocks;
        bf16* block = (bf16*)(blocks[position / a.block_size] + a.layer_offset);
        block += int64_t(head - a.num_heads) * a.block_size * a.head_dim;
        const int slot = position % a.block_size;
        if (head < values_from)
          keep_key(block, slot, a.head_dim, x);
        else
          keep_value(block, slot, a.head_dim, x, ends_run(row));
      }
    }
    count(thread, kRotate);
  }

  // Whether the next row is not the next token of the same sequence.
  bool ends_run(int row) const {
    const int next = row + 1;
    return next == call_->num_rows || call_->tables[next] != call_->tables[row] ||
           call_->positions[next] != call_->positions[row] + 1;
  }

  // One norm over the queries of all heads, one over the keys, each in one piece.
  void norm_all_heads(int thread, const LayerSpec& layer) {
    const Attention& a = layer.attention;
    const int widths[2] = {a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim};
    const int end = threads_->share(thread + 1, call_->num_rows * 2);
    bf16* row = own_[size_t(thread)].row;
    for (int unit = threads_->share(thread, call_->num_rows * 2); unit < end; unit++) {
      const int which = unit % 2, width = widths[which];
      bf16* x = projected_ + unit / 2 * projected_stride_ + (which ? a.key : a.query);
      norm_apart(x, width, which ? layer.key_norm : layer.query_norm, row);
    }
  }

  void attend(int thread, const LayerSpec& layer, const Kind& kind) {
#if defined(SET_AMX)
    if (layer.attention.head_dim % 32 == 0)
      return attend_by<TilesAttention>(thread, layer, kind, own_[size_t(thread)].tiles_scratch);
#endif
    attend_by<VectorsAttention>(thread, layer, kind, own_[size_t(thread)].scratch);
  }

  template <class Policy>
  void attend_by(int thread, const LayerSpec& layer, const Kind& kind,
                 AttentionScratch<Policy>* scratch) {
    const Attention& a = layer.attention;
    for (int i; (i = threads_->take_in_order(int(kind.tasks.size()))) >= 0;) {
      const Task& task = kind.tasks[size_t(i)];
      const size_t next = size_t(i + threads_->count());
      if (next < kind.tasks.size()) {
        const Task& later = kind.tasks[next];
        AttentionTask<Policy>(a, runs_[size_t(later.run)], later, *scratch).fetch_first();
      }
      AttentionTask<Policy>(a, runs_[size_t(task.run)], task, *scratch)
          .compute(projected_, projected_stride_, partials_, attended_, attended_stride_);
    }
    count(thread, kAttend);
    if (kind.merges.empty()) return;
    barrier(thread);
    for (int i; (i = threads_->take_in_order(int(kind.merges.size()))) >= 0;) {
      const Task& task = kind.merges[size_t(i)];
      float* total = scratch->total;
      for (int head = 0; head < task.num_kv_heads; head++) {
        clear_partial(total, task.num_columns, a.head_dim);
        for (int p = 0; p < task.partition; p++) {
          const int slot = task.slot + p * task.num_kv_heads + head;
          const float* part = partials_ + slot * partial_size(a.head_dim);
          merge_partial(total, part, part + 16, part + 32, task.num_columns, padded(a.head_dim));
        }
        finish(a, runs_[size_t(task.run)], task.kv_head + head, task.column, task.num_columns, total,
               attended_, attended_stride_);
      }
    }
    count(thread, kAttend);
  }

  void gate_up(int thread, const LayerSpec& layer, const Operand& x) {
    const auto row_of = [&](int block, int m) {
      return gated_ + (int64_t(block) * kRows + m) * gated_stride_;
    };
    with_activation(spec_.activation, [&](auto activation) {
      if (layer.gate_up.num_matrices == 1)
        return multiply(thread, layer.gate_up, x, call_->num_rows,
                        [&](const Chunk& chunk, int block, const Product& product) {
                          each_row(chunk, product, rows_of(block),
                                   [&](int m, int output, int step, int count, F value) {
                                     scatter16(row_of(block, m) + output, step,
                                               activation(rounded(value)), count);
                                   });
                        });
      const Cut cut = cut_for(layer.gate_up, call_->num_rows) == kBands ? kBands : kGroups;
      multiply(thread, layer.gate_up.width, num_gated_chunks(layer.gate_up), x, call_->num_rows,
               [&](int index) { return gated_chunk_of(layer.gate_up.matrices, index, cut); },
               [&](const Chunk& chunk, int block, const Product& product) {
                 store_gated(chunk, product, rows_of(block), activation, row_of(block, 0),
                             gated_stride_);
               });
    });
  }

  // --- experts

  // A row with one of the experts that it chose. Sorted by expert, then by row.
  struct Choice {
    int expert, row;
    float weight;
  };

  void mix_experts(int thread, const Experts& experts, const Operand& x, int sublayer) {
    into_rows(thread, experts.router, x, routed_, routed_stride_);
    barrier(thread);
    if (thread == 0) choose_experts(experts);
    barrier(thread);
    Matrix gates[2]{{nullptr, nullptr, experts.intermediate, kBf16},
                    {nullptr, nullptr, experts.intermediate, kBf16}};
    const int64_t width = spec_.hidden_size, inner = experts.intermediate;
    Product product;
    Block<Vectors::Element> block;
    const int gate_chunks = num_chunks_of(inner, kGroups);
    for_each_expert(thread, gate_chunks, [&](int expert, int index, int begin, int end) {
      gates[0].weight = experts.gate_up + expert * 2 * inner * width;
      gates[1].weight = (const bf16*)gates[0].weight + inner * width;
      const Chunk chunk = gated_chunk_of(gates, index, end - begin <= kFew ? kBands : kGroups);
      for (int at = begin; at < end; at += kRows) {
        block.num_rows = std::min(kRows, end - at);
        for (int m = 0; m < block.num_rows; m++) block.rows[m] = x.row(choices_[size_t(at + m)].row);
        Vectors::multiply(chunk, int(width), block, product);
        with_activation(spec_.activation, [&](auto activation) {
          store_gated(chunk, product, block.num_rows, activation, expert_gated_ + at * inner_stride_,
                      inner_stride_);
        });
      }
    });
    count(thread, kGateUp);
    barrier(thread);
    const int num_choices = int(choices_.size());
    if constexpr (kWidens) {
      const int stop = threads_->share(thread + 1, num_choices);
      for (int at = threads_->share(thread, num_choices); at < stop; at++)
        widen(expert_gated_ + at * inner_stride_, int(inner), expert_widened_ + at * inner_stride_);
      barrier(thread);
    }
    Matrix down{nullptr, nullptr, width, kBf16};
    const int down_chunks = num_chunks_of(width, kGroups);
    for_each_expert(thread, down_chunks, [&](int expert, int index, int begin, int end) {
      down.weight = experts.down + expert * inner * width;
      const Chunk chunk = chunk_of(down, index, 0, end - begin <= kFew ? kBands : kGroups);
      for (int at = begin; at < end; at += kRows) {
        block.num_rows = std::min(kRows, end - at);
        for (int m = 0; m < block.num_rows; m++) block.rows[m] = gated_row(at + m);
        Vectors::multiply(chunk, int(inner), block, product);
        each_row(chunk, product, block.num_rows,
                 [&](int m, int output, int step, int count, F value) {
                   bf16* row = expert_out_ + (at + m) * hidden_stride_;
                   scatter16(row + output, step, value, count);
                 });
      }
    });
    count(thread, kDown);
    barrier(thread);
    for (int row = threads_->share(thread, call_->num_rows);
         row < threads_->share(thread + 1, call_->num_rows); row++)
      combine_experts(row, experts.top_k, sublayers_[sublayer] + row * hidden_stride_);
    count(thread, kDown);
  }

  const Vectors::Element* gated_row(int choice) const {
    if constexpr (kWidens)
      return (const Vectors::Element*)(expert_widened_ + choice * inner_stride_);
    else
      return (const Vectors::Element*)(expert_gated_ + choice * inner_stride_);
  }

  // Of each row the experts with the highest probabilities, of equal ones the first. Takes no memory:
  // the other threads wait.
  void choose_experts(const Experts& experts) {
    choices_.clear();
    float* p = probabilities_.data();
    for (int row = 0; row < call_->num_rows; row++) {
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
    experts_.clear();
    std::fill(num_of_row_.begin(), num_of_row_.end(), 0);
    for (int at = 0; at < int(choices_.size()); at++) {
      const Choice& choice = choices_[size_t(at)];
      if (!at || choices_[size_t(at) - 1].expert != choice.expert) experts_.push_back(at);
      const int number = num_of_row_[size_t(choice.row)]++;
      of_row_[size_t(choice.row * experts.top_k + number)] = at;
    }
  }

  // work(expert, chunk, first choice, end of its choices) for the chunks that this thread takes.
  template <class Work>
  void for_each_expert(int thread, int chunks, Work work) {
    const int num_experts = int(experts_.size());
    for (int item; (item = threads_->take(thread, chunks * num_experts)) >= 0;) {
      const int index = item / chunks, begin = experts_[size_t(index)];
      const int end = index + 1 < num_experts ? experts_[size_t(index) + 1] : int(choices_.size());
      work(choices_[size_t(begin)].expert, item % chunks, begin, end);
    }
  }

  // The sum of what a row's experts gave, in their order, rounded after each.
  void combine_experts(int row, int top_k, bf16* to) {
    for (int k = 0; k < hidden_stride_; k += kLanes) {
      F sum = splat(0.f);
      for (int i = 0; i < num_of_row_[size_t(row)]; i++) {
        const int at = of_row_[size_t(row * top_k + i)];
        const F part = load16(expert_out_ + at * hidden_stride_ + k);
        sum = rounded(sum + rounded(part * splat(choices_[size_t(at)].weight)));
      }
      store16(to + k, sum);
    }
  }

  template <class Activation>
  static void store_gated(const Chunk& chunk, const Product& product, int num_rows,
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

  // The residual stream to whom it may concern; the rows asked for, their norm, the head.
  void end(int thread) {
    if (call_->hidden && (!alone() || thread == 0))
      for (int row = first_row(thread); row < end_row(thread); row++) {
        bf16* to = call_->hidden + row * hidden_stride_;
        memcpy(to, hidden_at(thread) + row * hidden_stride_, size_t(hidden_stride_) * 2);
        if (call_->norms_hidden && spec_.final_norm.kind != kNoNorm)
          norm_into(to, spec_.hidden_size, spec_.final_norm, to);
      }
    if (call_->num_logit_rows) logits(thread);
  }

  void logits(int thread) {
    const int size = spec_.hidden_size, num_rows = call_->num_logit_rows;
    Own& own = own_[size_t(thread)];
    if (!alone()) barrier(thread);  // all rows are there
    // Few rows each thread norms for itself, whoever has computed them.
    const bool few = num_rows <= kRows;
    bf16* normed = few ? own.normed : normed_;
    const int blocks = (num_rows + kRows - 1) / kRows;
    const int begin = few ? 0 : threads_->share(thread, blocks) * kRows;
    const int end = few ? num_rows : std::min(num_rows, threads_->share(thread + 1, blocks) * kRows);
    Operand x{normed, hidden_stride_, size};
    if (kWidens) x.widened = few ? own.widened : widened_;
    if (kHasTiles) x.paired = few ? own.paired : paired_;
    const bool packed = any_packed(spec_.head);
    if (packed) x.shortened = few ? own.shortened : shortened_;
    for (int at = begin; at < end; at++) {
      bf16* row = normed + at * hidden_stride_;
      norm_into(hidden_at(thread) + call_->logit_rows[at] * hidden_stride_, size, spec_.final_norm,
                row);
      if (kWidens) widen(row, size, x.widened + int64_t(at) * padded(size));
      if (packed) shorten(row, size, x.shortened_row(at));
    }
    if (kHasTiles)
      for (int at = begin; at < end; at += kRows) {
        const bf16* block[kRows] = {};
        for (int m = 0; m < kRows && at + m < end; m++) block[m] = normed + (at + m) * hidden_stride_;
        pair_rows(block, size, x.paired + int64_t(at) * padded(size));
      }
    if (!few) barrier(thread);
    const int64_t vocab = spec_.head.num_outputs;
    multiply(thread, spec_.head, x, num_rows,
             [&](const Chunk& chunk, int block, const Product& product) {
               each_row(chunk, product, std::min(kRows, num_rows - block * kRows),
                        [&](int m, int output, int step, int count, F value) {
                          const int64_t row = int64_t(block) * kRows + m;
                          alignas(64) float values[kLanes];
                          store(values, final_logits(value));
                          count = std::min(count, kLanes);
                          scatter(call_->logits + row * vocab + output, step, values, count);
                        });
             });
    count(thread, kLogits);
  }

  F final_logits(F x) const {
    if (spec_.logit_scale != 1.f) x = x * splat(spec_.logit_scale);
    if (spec_.logit_softcap != 0) {
      const F cap = splat(spec_.logit_softcap);
      x = rounded(rounded(tanh_of(rounded(rounded(x) / cap))) * cap);
    }
    return x;
  }

  static void scatter(float* to, int step, const float* values, int count) {
    if (step == 1) return (void)memcpy(to, values, size_t(count) * sizeof(float));
    for (int i = 0; i < count; i++) to[int64_t(i) * step] = values[i];
  }

  const DecoderSpec spec_;
  Threads* threads_;
  std::vector<Own> own_;
  int64_t hidden_stride_, projected_stride_, attended_stride_, gated_stride_;
  bf16 *hidden_, *normed_, *sublayers_[2], *projected_, *attended_, *gated_;
  float* widened_ = nullptr;
  bf16* paired_ = nullptr;
  char* shortened_ = nullptr;
  float* partials_;
  int64_t routed_stride_ = 0, inner_stride_ = 0;
  bf16 *routed_ = nullptr, *expert_gated_ = nullptr, *expert_out_ = nullptr;
  float* expert_widened_ = nullptr;
  size_t bytes_ = 0;
  // Of the present call.
  const Call* call_ = nullptr;
  std::vector<Run> runs_;
  std::vector<Kind> kinds_;
  std::vector<int> kind_of_;
  std::vector<Choice> choices_;
  std::vector<int> experts_;  // the first choice of each expert that was chosen
  std::vector<int> of_row_, num_of_row_;  // each row's choices, [row][top_k]
  std::vector<float> probabilities_;
  uint64_t since_ = 0, counted_[kNumTimed] = {};
};

}  // namespace

extern "C" {

int onecopy_request_registers() { return request_registers(); }
// For a check that both sides mean the same: sizes of the structures.
int onecopy_size_of_layer() { return sizeof(LayerSpec); }
int onecopy_size_of_decoder() { return sizeof(DecoderSpec); }
int onecopy_size_of_call() { return sizeof(Call); }

void* onecopy_decoder_create(const DecoderSpec* spec) {
  try {
    return new Decoder(*spec);
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}
int64_t onecopy_decoder_workspace_bytes(void* decoder) {
  return int64_t(((Decoder*)decoder)->workspace_bytes());
}
// Elements from one row of the residual stream to the next.
int64_t onecopy_decoder_hidden_stride(void* decoder) { return ((Decoder*)decoder)->hidden_stride(); }
// 0, or 1 if no thread can be started, or 2 where the ranks can't go on.
int onecopy_decoder_forward(void* decoder, Call* call) {
  try {
    if (!((Decoder*)decoder)->forward(*call)) return 1;
    return call->outcome.result ? 2 : 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}
void onecopy_decoder_counted(void* decoder, uint64_t* out) {
  for (int i = 0; i < kNumTimed; i++) out[i] = ((Decoder*)decoder)->counted(i);
}
void onecopy_decoder_destroy(void* decoder) { delete (Decoder*)decoder; }

}  // extern "C"
