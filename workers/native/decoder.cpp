// A whole step of a decoder on the shared weights: embedding, layers, logits.
//
// The caller (decoder.py) checks every index and keeps every pointer alive; nothing is checked here.
// Invariant: weights are read where they lie and never written or repacked, and a row's result
// depends neither on the other rows of the call nor on the number of threads.
//
// A call of up to 16 rows is one block: each thread then norms and arranges it for itself, which
// costs less than passing it around. More rows are shared out, 16 to a block.
#include <cerrno>
#include <new>

#include "attention.h"
#include "threads.h"

namespace {

enum Activation { kSilu = 0, kGeluTanh = 1 };

// Operations whose time is counted.
enum Timed { kNorm, kQkv, kRotate, kAttend, kOutput, kGateUp, kDown, kLogits, kWait, kNumTimed };

constexpr int kTasksEach = 4;  // of attention, that a thread should have to choose from

}  // namespace

extern "C" {

struct LayerSpec {
  Linear qkv, output, gate_up, down;
  Norm input_norm, attention_norm, mlp_norm, mlp_output_norm, query_norm, key_norm;
  Attention attention;
  int32_t rope;  // which of the tables
};

struct DecoderSpec {
  const LayerSpec* layers;
  int32_t num_layers, hidden_size, intermediate_size, activation;
  const bf16* embedding;
  float embedding_scale;  // 0: none
  Norm final_norm;
  Linear head;
  float logit_softcap;  // 0: none
  const bf16* rope_cos[2];  // [max_model_len, rotary_dim / 2]
  const bf16* rope_sin[2];
  int32_t rotary_dim, max_rows, max_model_len, num_threads;
};

struct Call {
  const int32_t* token_ids;
  const int32_t* positions;
  const int32_t* tables;
  const int64_t* addresses;
  const int32_t* logit_rows;
  float* logits;     // or null
  int32_t* greedy;   // or null
  int32_t num_rows, max_blocks, num_logit_rows, num_threads;
};

}  // extern "C"

namespace {

template <class T>
T* aligned(size_t count, size_t& bytes) {
  bytes += (count * sizeof(T) + 63) / 64 * 64;
  return static_cast<T*>(operator new(count * sizeof(T), std::align_val_t(64)));
}

struct Best {
  float value;
  int32_t index;
};

class Decoder {
 public:
  explicit Decoder(const DecoderSpec& spec)
      : spec_(spec), layers_(spec.layers, spec.layers + spec.num_layers) {
    for (const LayerSpec& layer : layers_) {
      max_outputs_ = std::max(max_outputs_, layer.qkv.num_outputs);
      attention_size_ = std::max(attention_size_, layer.output.width);
    }
    const int rows = (spec.max_rows + 15) / 16 * 16;
    hidden_ = aligned<bf16>(size_t(rows) * spec.hidden_size, workspace_bytes_);
    normed_ = aligned<bf16>(size_t(rows) * spec.hidden_size, workspace_bytes_);
    sublayer_ = aligned<bf16>(size_t(rows) * spec.hidden_size, workspace_bytes_);
    projected_ = aligned<bf16>(size_t(rows) * max_outputs_, workspace_bytes_);
    attended_ = aligned<bf16>(size_t(rows) * attention_size_, workspace_bytes_);
    attended_paired_ = aligned<bf16>(size_t(rows) * attention_size_, workspace_bytes_);
    gated_ = aligned<bf16>(size_t(rows) * spec.intermediate_size, workspace_bytes_);
    own_.resize(spec.num_threads);
    for (Own& own : own_) {
      own.hidden = aligned<bf16>(size_t(kRows) * spec.hidden_size, workspace_bytes_);
      own.normed = aligned<bf16>(size_t(kRows) * spec.hidden_size, workspace_bytes_);
      own.attended = aligned<bf16>(size_t(kRows) * attention_size_, workspace_bytes_);
      own.best = aligned<Best>(rows, workspace_bytes_);
      own.scratch = aligned<AttentionScratch>(1, workspace_bytes_);
      memset((void*)own.scratch, 0, sizeof(AttentionScratch));
    }
    // Only a run with more than 1 / max_split_runs() of all keys is split.
    const int64_t partitions = (spec.max_model_len + kPartition - 1) / kPartition;
    int64_t floats = 0;
    for (const LayerSpec& layer : layers_)
      floats = std::max(floats, max_split_runs() * partitions * layer.attention.num_kv_heads *
                                    partial_size(layer.attention.head_dim));
    partials_ = aligned<float>(floats, workspace_bytes_);
    threads_ = new Threads(spec.num_threads);
  }

  ~Decoder() {
    if (threads_->of_this_process()) {
      threads_->stop();
      delete threads_;
    }
    for (void* p : {(void*)hidden_, (void*)normed_, (void*)sublayer_, (void*)projected_,
                    (void*)attended_, (void*)attended_paired_, (void*)gated_, (void*)partials_})
      operator delete(p, std::align_val_t(64));
    for (Own& own : own_)
      for (void* p : {(void*)own.hidden, (void*)own.normed, (void*)own.attended, (void*)own.best,
                      (void*)own.scratch})
        operator delete(p, std::align_val_t(64));
  }

  bool forward(const Call& call) {
    // In a forked child the parent's threads don't exist, and their words may be in any state.
    if (!threads_->of_this_process()) threads_ = new Threads(spec_.num_threads);
    threads_->use(call.num_threads);
    call_ = &call;
    num_blocks_ = (call.num_rows + 15) / 16;
    plan_attention();
    return threads_->run([](void* self, int thread) { ((Decoder*)self)->step(thread); }, this);
  }

  void stop() {
    if (threads_->of_this_process()) threads_->stop();
  }

  size_t workspace_bytes() const { return workspace_bytes_; }
  uint64_t cycles(int operation) const { return cycles_[operation]; }

 private:
  struct Own {
    bf16 *hidden, *normed, *attended;
    Best* best;
    AttentionScratch* scratch;
    bf16 *hidden_at, *normed_at, *attended_at;  // in this call
  };

  bool alone() const { return num_blocks_ == 1; }

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
    kind_of_.resize(layers_.size());
    for (size_t i = 0; i < layers_.size(); i++) {
      const Attention& a = layers_[i].attention;
      size_t kind = 0;
      while (kind < kinds_.size() &&
             !(kinds_[kind].window == a.window && kinds_[kind].num_heads == a.num_heads &&
               kinds_[kind].num_kv_heads == a.num_kv_heads))
        kind++;
      if (kind == kinds_.size()) {
        kinds_.push_back({a.window, a.num_heads, a.num_kv_heads, {}, {}});
        plan_kind(kinds_.back());
      }
      kind_of_[i] = int(kind);
    }
  }

  struct Kind {  // layers with the same tasks
    int window, num_heads, num_kv_heads;
    std::vector<Task> tasks;
    std::vector<Task> merges;  // one for a split task, with the number of its partitions
  };

  int max_split_runs() const { return 2 * spec_.num_threads; }

  void plan_kind(Kind& kind) {
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
      const Run& run = runs_[r];
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
          const int last = (run.position + (column + num_columns - 1) / group) / kPartition;
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
      const Run& run = runs_[task.run];
      const int last = run.position + (task.column + task.num_columns - 1) / group;
      const int64_t keys = task.partition < 0
                               ? last + 1 - first_key(last)
                               : std::min(kPartition, last + 1 - task.partition * kPartition);
      return keys * ((task.num_columns + kRows - 1) / kRows) * task.num_kv_heads;
    };
    std::stable_sort(kind.tasks.begin(), kind.tasks.end(),
                     [&](const Task& a, const Task& b) { return cost(a) > cost(b); });
  }

  // Thread 0's time since the last call goes to `operation`.
  void count(int thread, Timed operation) {
    if (thread) return;
    const uint64_t now = __rdtsc();
    cycles_[operation] += now - since_;
    since_ = now;
  }
  void barrier(int thread) {
    threads_->barrier();
    count(thread, kWait);
  }

  void step(int thread) {
    static const TileConfig config;
    _tile_loadconfig(&config);
    // As in the tiles, what is too small to be normal is zero: it would take a hundred times longer.
    const unsigned int control = _mm_getcsr();
    _mm_setcsr(control | 0x8040);
    if (thread == 0) since_ = __rdtsc();
    Own& own = own_[thread];
    own.hidden_at = alone() ? own.hidden : hidden_;
    own.normed_at = alone() ? own.normed : normed_;
    own.attended_at = alone() ? own.attended : attended_paired_;
    embed(thread);
    for (size_t i = 0; i < layers_.size(); i++) {
      const LayerSpec& layer = layers_[i];
      norm(thread, i ? &layers_[i - 1].mlp_output_norm : nullptr, &layer.input_norm);
      project(thread, layer);
      prefetch_first(thread, layer.output);
      barrier(thread);
      rotate_and_keep(thread, layer);
      barrier(thread);
      attend(thread, layer, kinds_[kind_of_[i]]);
      barrier(thread);
      arrange(thread, layer);
      to_hidden(thread, layer.output, own.attended_at);
      prefetch_first_gated(thread, layer.gate_up);
      count(thread, kOutput);
      barrier(thread);
      norm(thread, &layer.attention_norm, &layer.mlp_norm);
      gate_up(thread, layer);
      prefetch_first(thread, layer.down);
      count(thread, kGateUp);
      barrier(thread);
      to_hidden(thread, layer.down, gated_);
      prefetch_first(thread, i + 1 < layers_.size() ? layers_[i + 1].qkv : spec_.head);
      count(thread, kDown);
      barrier(thread);
    }
    if (call_->num_logit_rows) logits(thread);
    _mm_setcsr(control);
    _tile_release();
  }

  // Blocks that a thread arranges itself: the only one, or its share.
  int first_block(int thread) const { return alone() ? 0 : threads_->share(thread, num_blocks_); }
  int end_block(int thread) const { return alone() ? 1 : threads_->share(thread + 1, num_blocks_); }

  void embed(int thread) {
    const int size = spec_.hidden_size;
    for (int b = first_block(thread); b < end_block(thread); b++) {
      const bf16* rows[kRows] = {};
      for (int m = 0; m < kRows && b * kRows + m < call_->num_rows; m++)
        rows[m] = spec_.embedding + int64_t(call_->token_ids[b * kRows + m]) * size;
      bf16* block = own_[thread].hidden_at + int64_t(b) * kRows * size;
      pair_rows(rows, size, block);
      if (spec_.embedding_scale != 0) {
        const __m512 scale = _mm512_set1_ps(spec_.embedding_scale);
        for (int k = 0; k < size; k += 2) {
          const __m512i x = _mm512_load_si512(block + k * kRows);
          _mm512_store_si512(block + k * kRows, join(_mm512_mul_ps(low_half(x), scale),
                                                     _mm512_mul_ps(high_half(x), scale)));
        }
      }
    }
  }

  // Add what the last sublayer gave, unless `before` is null, and norm for the next one.
  void norm(int thread, const Norm* before, const Norm* next) {
    const int size = spec_.hidden_size;
    for (int b = first_block(thread); b < end_block(thread); b++) {
      const int64_t at = int64_t(b) * kRows * size;
      bf16* hidden = own_[thread].hidden_at + at;
      if (before) add_block(hidden, sublayer_ + at, size, *before);
      if (next) norm_block(hidden, size, *next, own_[thread].normed_at + at);
    }
    count(thread, kNorm);
    if (!alone()) barrier(thread);
  }

  // Calls store(chunk, block, product) for each chunk that this thread takes and each block.
  template <class ChunkOf, class Store>
  void multiply(int thread, const Linear& linear, int chunks, const bf16* x, int blocks,
                ChunkOf chunk_at, Store store) {
    alignas(64) float out[2][2][256];
    const int64_t block_size = int64_t(linear.width) * kRows;
    for (int index; (index = threads_->take(thread, chunks)) >= 0;) {
      const Chunk chunk = chunk_at(linear, index);
      Chunk next;
      const bool has_next = index + 1 < chunks;
      if (has_next) next = chunk_at(linear, index + 1);
      Ahead ahead(has_next ? &next : nullptr, linear.width, (blocks + 1) / 2);
      int b = 0;
      for (; b + 1 < blocks; b += 2) {
        multiply2(chunk, x + b * block_size, linear.width, ahead, out);
        store(chunk, b, out[0]);
        store(chunk, b + 1, out[1]);
      }
      if (b < blocks) {
        multiply1(chunk, x + b * block_size, linear.width, ahead, out);
        store(chunk, b, out[0]);
      }
    }
  }

  void prefetch_first(int thread, const Linear& linear) {
    if (alone())
      prefetch_chunk(chunk_of(linear, threads_->share(thread, num_chunks(linear))), linear.width);
  }
  void prefetch_first_gated(int thread, const Linear& linear) {
    if (alone())
      prefetch_chunk(gated_chunk_of(linear, threads_->share(thread, num_gated_chunks(linear))),
                     linear.width);
  }

  int rows_of(int block) const { return std::min(kRows, call_->num_rows - block * kRows); }

  void project(int thread, const LayerSpec& layer) {
    const int64_t stride = layer.qkv.num_outputs;
    multiply(thread, layer.qkv, num_chunks(layer.qkv), own_[thread].normed_at, num_blocks_,
             chunk_of, [&](const Chunk& chunk, int block, const float(*out)[256]) {
               by_rows(chunk, out, rows_of(block), [&](int i, int m, __m512 values) {
                 store16(projected_ + (int64_t(block) * kRows + m) * stride + chunk.outputs[i],
                         values);
               });
             });
    count(thread, kQkv);
  }

  // Norm and rotate the heads of queries and keys; put keys and values into the blocks.
  void rotate_and_keep(int thread, const LayerSpec& layer) {
    const Attention& a = layer.attention;
    const int units = a.num_heads + 2 * a.num_kv_heads;
    const int half = spec_.rotary_dim / 2;
    const int end = threads_->share(thread + 1, call_->num_rows * units);
    for (int unit = threads_->share(thread, call_->num_rows * units); unit < end; unit++) {
      const int row = unit / units, head = unit % units;
      const int position = call_->positions[row];
      bf16* x = projected_ + int64_t(row) * layer.qkv.num_outputs + head * a.head_dim;
      if (head < a.num_heads + a.num_kv_heads) {
        const Norm& norm = head < a.num_heads ? layer.query_norm : layer.key_norm;
        if (norm.weight) norm_row(x, a.head_dim, norm);
        rotate(x, spec_.rotary_dim, spec_.rope_cos[layer.rope] + int64_t(position) * half,
               spec_.rope_sin[layer.rope] + int64_t(position) * half);
      }
      if (head >= a.num_heads) {
        const int64_t* blocks = call_->addresses + int64_t(call_->tables[row]) * call_->max_blocks;
        bf16* block = (bf16*)(blocks[position / a.block_size] + a.layer_offset);
        const int64_t slot = int64_t(head - a.num_heads) * a.block_size + position % a.block_size;
        memcpy(block + slot * a.head_dim, x, a.head_dim * 2);
      }
    }
    count(thread, kRotate);
  }

  void attend(int thread, const LayerSpec& layer, const Kind& kind) {
    const Attention& a = layer.attention;
    Own& own = own_[thread];
    for (int i; (i = threads_->take_in_order(int(kind.tasks.size()))) >= 0;) {
      const Task& task = kind.tasks[i];
      AttentionTask(a, runs_[task.run], task, *own.scratch)
          .compute(projected_, layer.qkv.num_outputs, partials_, attended_);
    }
    count(thread, kAttend);
    if (kind.merges.empty()) return;
    barrier(thread);
    for (int i; (i = threads_->take_in_order(int(kind.merges.size()))) >= 0;) {
      const Task& task = kind.merges[i];
      float* total = own.scratch->total;
      for (int head = 0; head < task.num_kv_heads; head++) {
        clear_partial(total, a.head_dim);
        for (int p = 0; p < task.partition; p++) {
          const int slot = task.slot + p * task.num_kv_heads + head;
          const float* part = partials_ + slot * partial_size(a.head_dim);
          merge_partial(total, part, part + 16, part + 32, task.num_columns, a.head_dim);
        }
        finish(a, runs_[task.run], task.kv_head + head, task.column, task.num_columns, total,
               attended_);
      }
    }
    count(thread, kAttend);
  }

  // The attention's results, row by row so far, as operands.
  void arrange(int thread, const LayerSpec& layer) {
    const int size = layer.output.width;
    for (int b = first_block(thread); b < end_block(thread); b++) {
      const bf16* rows[kRows] = {};
      for (int m = 0; m < rows_of(b); m++) rows[m] = attended_ + int64_t(b * kRows + m) * size;
      pair_rows(rows, size, own_[thread].attended_at + int64_t(b) * kRows * size);
    }
    count(thread, kAttend);
    if (!alone()) barrier(thread);
  }

  void to_hidden(int thread, const Linear& linear, const bf16* x) {
    multiply(thread, linear, num_chunks(linear), x, num_blocks_, chunk_of,
             [&](const Chunk& chunk, int block, const float(*out)[256]) {
               store_paired(chunk, out, sublayer_ + int64_t(block) * kRows * spec_.hidden_size);
             });
  }

  void gate_up(int thread, const LayerSpec& layer) {
    const auto with = [&](auto activation) {
      multiply(thread, layer.gate_up, num_gated_chunks(layer.gate_up), own_[thread].normed_at,
               num_blocks_, gated_chunk_of,
               [&](const Chunk& chunk, int block, const float(*out)[256]) {
                 store_gated(chunk, out, gated_ + int64_t(block) * kRows * spec_.intermediate_size,
                             activation);
               });
    };
    if (spec_.activation == kSilu)
      with([](__m512 x) { return silu_ps(x); });
    else
      with([](__m512 x) { return gelu_tanh_ps(x); });
  }

  // The last residual, the rows asked for, their norm, the head.
  void logits(int thread) {
    const int size = spec_.hidden_size, count_rows = call_->num_logit_rows;
    const int blocks = (count_rows + 15) / 16;
    Own& own = own_[thread];
    norm(thread, &layers_.back().mlp_output_norm, nullptr);
    const bool each_alone = blocks == 1;
    bf16* x = each_alone ? own.normed : normed_;
    const int begin = each_alone ? 0 : threads_->share(thread, blocks);
    const int end = each_alone ? 1 : threads_->share(thread + 1, blocks);
    for (int b = begin; b < end; b++) {
      alignas(64) int32_t offsets[16];
      for (int m = 0; m < kRows; m++) {
        const int at = std::min(b * kRows + m, count_rows - 1);
        const int row = call_->logit_rows[at];
        offsets[m] = row / kRows * (kRows * size / 2) + row % kRows;
      }
      const __m512i from = _mm512_load_si512(offsets);
      bf16* block = x + int64_t(b) * kRows * size;
      for (int k = 0; k < size / 2; k++)
        _mm512_store_si512(
            block + k * 32,
            _mm512_i32gather_epi32(from, (const int*)own.hidden_at + k * kRows, 4));
      norm_block(block, size, spec_.final_norm, block);
    }
    for (int i = 0; i < count_rows; i++) own.best[i] = {-INFINITY, 0};
    if (!each_alone) barrier(thread);
    const int64_t vocab = spec_.head.num_outputs;
    multiply(thread, spec_.head, num_chunks(spec_.head), x, blocks, chunk_of,
             [&](const Chunk& chunk, int block, const float(*out)[256]) {
               by_rows(chunk, out, std::min(kRows, count_rows - block * kRows),
                       [&](int i, int m, __m512 values) {
                         const int64_t row = int64_t(block) * kRows + m;
                         values = final_logits(values);
                         const __mmask16 mine =
                             _mm512_cmpge_epi32_mask(lane_index(), _mm512_set1_epi32(chunk.first[i]));
                         if (call_->logits)
                           _mm512_mask_storeu_ps(call_->logits + row * vocab + chunk.outputs[i],
                                                 mine, values);
                         if (call_->greedy) consider(own.best[row], values, chunk.outputs[i]);
                       });
             });
    count(thread, kLogits);
    if (call_->greedy) {
      barrier(thread);
      if (thread == 0) choose();
    }
  }

  __m512 final_logits(__m512 x) const {
    if (spec_.logit_softcap != 0) {
      x = rounded(x);
      const __m512 cap = _mm512_set1_ps(spec_.logit_softcap);
      x = rounded(_mm512_div_ps(x, cap));
      x = rounded(tanh_ps(x));
      x = rounded(_mm512_mul_ps(x, cap));
    }
    return x;
  }

  // Of equal logits the first counts, whichever thread has seen it.
  static void consider(Best& best, __m512 values, int output) {
    const float most = _mm512_reduce_max_ps(values);
    if (most < best.value) return;
    const __mmask16 where = _mm512_cmpeq_ps_mask(values, _mm512_set1_ps(most));
    if (!where) return;
    const int index = output + __builtin_ctz(where);
    if (most > best.value || index < best.index) best = {most, index};
  }
  void choose() {
    for (int row = 0; row < call_->num_logit_rows; row++) {
      Best best = own_[0].best[row];
      for (int thread = 1; thread < threads_->count(); thread++) {
        const Best& other = own_[thread].best[row];
        if (other.value > best.value || (other.value == best.value && other.index < best.index))
          best = other;
      }
      call_->greedy[row] = best.index;
    }
  }

  const DecoderSpec spec_;
  const std::vector<LayerSpec> layers_;
  Threads* threads_;
  std::vector<Own> own_;
  bf16 *hidden_, *normed_, *sublayer_, *attended_paired_;  // paired blocks
  bf16 *projected_, *attended_;                            // rows
  bf16* gated_;                                            // paired blocks
  float* partials_;
  int max_outputs_ = 0, attention_size_ = 0;
  size_t workspace_bytes_ = 0;
  // Of the present call.
  const Call* call_ = nullptr;
  int num_blocks_ = 0;
  std::vector<Run> runs_;
  std::vector<Kind> kinds_;
  std::vector<int> kind_of_;
  uint64_t since_ = 0, cycles_[kNumTimed] = {};
};

}  // namespace

extern "C" {

// Ask the kernel for the AMX registers. 0, or an errno.
int onecopy_request_amx() {
  constexpr int kRequest = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0 ? 0 : errno;
}
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
// 0, or 1 if no thread can be started.
int onecopy_decoder_forward(void* decoder, const Call* call) {
  try {
    return ((Decoder*)decoder)->forward(*call) ? 0 : 1;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}
void onecopy_decoder_cycles(void* decoder, uint64_t* out) {
  for (int i = 0; i < kNumTimed; i++) out[i] = ((Decoder*)decoder)->cycles(i);
}
void onecopy_decoder_stop(void* decoder) { ((Decoder*)decoder)->stop(); }
void onecopy_decoder_destroy(void* decoder) { delete (Decoder*)decoder; }

}  // extern "C"
