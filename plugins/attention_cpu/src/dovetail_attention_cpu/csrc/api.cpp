// C functions that backend.py calls. They are built without headers of Python or a tensor library.
#include "kernel.h"

using namespace dovetail;

namespace {

const Step& step_of(const Layer& layer, const dovetail_step* step) {
  return *static_cast<const Step*>(step->attention[layer.index]);
}

template <Phase phase>
dovetail_op operation(const Layer* layer) {
  return {[](const void* self, const dovetail_step* step) {
            return num_pieces(step_of(*static_cast<const Layer*>(self), step), phase);
          },
          [](const void* self, const dovetail_step* step, int32_t piece, int32_t thread) {
            const auto& layer = *static_cast<const Layer*>(self);
            do_piece(step_of(layer, step), layer, phase, piece, thread);
          },
          layer};
}

}  // namespace

extern "C" {

// Types are passed as 0: float32, 1: bfloat16, 2: float16, 3: int8, 4: float8_e4m3fn.

Step* dovetail_plan(const int32_t* query_start, const int32_t* seq_lens, int num_seqs, int num_heads, int num_kv_heads,
                    int head_size, int block_size, int window, const int32_t* block_table, int64_t block_table_stride,
                    const int64_t* slots, int num_threads) {
  auto* step = new Step;
  step->geometry = {num_heads, num_kv_heads, head_size, block_size, window};
  step->block_table = block_table;
  step->block_table_stride = block_table_stride;
  step->slots = slots;
  make_step(*step, {query_start, query_start + num_seqs + 1}, {seq_lens, seq_lens + num_seqs}, num_threads);
  return step;
}

void dovetail_free(Step* step) { delete step; }

int64_t dovetail_workspace_bytes(const Step* step) {
  return step->num_threads * scratch_bytes(*step) + step->partial_floats * static_cast<int64_t>(sizeof(float));
}

double dovetail_cost(const Step* step) { return step->cost; }

void dovetail_set_workspace(Step* step, char* workspace) { step->workspace = workspace; }

void dovetail_run(const Step* step, float scale, float soft_cap, const float* sinks, const float* kv_scales, int type, void* q,
                  int64_t q_token, int64_t q_head, void* k, int64_t k_token, int64_t k_head, void* v, int64_t v_token, int64_t v_head,
                  int cache_type, void* cache, void* out, int64_t out_token, int64_t out_head) {
  const auto t = static_cast<Type>(type);
  run(*step, {{scale, soft_cap, sinks, kv_scales}, {q, q_token, q_head, t}, {k, k_token, k_head, t}, {v, v_token, v_head, t},
              {out, out_token, out_head, t}, {cache, static_cast<Type>(cache_type)}});
}

// Returns one layer's three operations for compiled steps. The caller frees them with dovetail_free_layer.
Layer* dovetail_compile(int index, int head_size, float scale, float soft_cap, const float* sinks, const float* kv_scales,
                        const dovetail_attention_call* call, int cache_type, void* cache, dovetail_op* ops) {
  const auto t = static_cast<Type>(call->type);
  auto rows = [&](const void* data, int64_t stride) { return Rows{const_cast<void*>(data), stride, head_size, t}; };
  auto* layer = new Layer{{scale, soft_cap, sinks, kv_scales}, rows(call->q, call->q_stride), rows(call->k, call->k_stride),
                          rows(call->v, call->v_stride), rows(call->out, call->out_stride),
                          {cache, static_cast<Type>(cache_type)}, index};
  ops[0] = operation<Phase::write>(layer);
  ops[1] = operation<Phase::attend>(layer);
  ops[2] = operation<Phase::merge>(layer);
  return layer;
}

void dovetail_free_layer(Layer* layer) { delete layer; }

// Copies keys and values, contiguous [num_tokens, Hkv, D] in the cache's type, to or from the given slots.
void dovetail_copy_tokens(int to_cache, int cache_type, void* cache, int num_kv_heads, int head_size, int block_size,
                          const int64_t* slots, int64_t num_tokens, void* keys, void* values) {
  const Geometry g{num_kv_heads, num_kv_heads, head_size, block_size, 0};
  const auto t = static_cast<Type>(cache_type);
  const int64_t stride = static_cast<int64_t>(num_kv_heads) * head_size;
  const Rows k{keys, stride, head_size, t}, v{values, stride, head_size, t};
  (to_cache ? write_tokens : read_tokens)(g, {cache, t}, slots, k, v, 0, num_tokens);
}

const char* dovetail_instruction_set() { return instruction_set(); }
}
