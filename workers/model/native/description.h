// A model and a call, as the caller (decoder.py) describes them.
//
// Owns the structures that cross the border; library.py writes them down once more, and their sizes
// are compared when a library is opened. Invariant: nothing here is changed but a call's outcome; the
// caller has checked every index and keeps every pointer alive. Knows nothing of how it is computed.
#pragma once
#include "attention.h"

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
  int32_t kept_bits;  // of keys and values, as Attention's
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
  const int64_t* open_blocks;  // [num_tables][2][num_open_blocks]: see Run; or null
  const int32_t* logit_rows;
  bf16* hidden;      // the residual stream, [num_rows][padded(hidden_size)]; or null
  float* logits;     // [num_logit_rows][vocab size]
  int32_t num_layers, num_rows, max_blocks, num_logit_rows, num_threads;
  int32_t num_open_blocks;
  int32_t norms_hidden;  // what goes out as `hidden` is the final norm's
  Outcome outcome;       // of the ranks' sums: the first error
};

}  // extern "C"
