// Compiled steps: one call computes a whole step, with operations from several plugins' libraries.
//
// A step is a list of operations, each cut into pieces. A team of threads goes through the list; in each operation every
// thread takes pieces until none is left, then waits until all are done. No thread is waited for that the system does not
// let run: the others do its share. What an operation computes must not depend on who does which piece, or when.
//
// The layout of these structs is the contract (interfaces/compiled.py states its version); fields are added at the end.
#pragma once

#include <cstdint>

extern "C" {

struct dovetail_step {
  int32_t num_tokens, num_threads;
  const int64_t* token_ids;       // [num_tokens]
  const int64_t* positions;       // [num_tokens]
  const void* const* attention;   // by layer: what the attention backend planned for it (CompiledAttention.address)
};

struct dovetail_op {
  // How many pieces of work this step has; 0: nothing to do. Asked by every thread, with one answer.
  int32_t (*pieces)(const void* self, const dovetail_step* step);
  // Do one. `thread` is below step->num_threads, and no two pieces run on one thread at a time.
  void (*piece)(const void* self, const dovetail_step* step, int32_t piece, int32_t thread);
  const void* self;
};

// One layer's attention: where its operands lie. Strides are in elements, from token to token; a token's heads are contiguous.
struct dovetail_attention_call {
  const void *q, *k, *v;  // [T, Hq, D], [T, Hkv, D], [T, Hkv, D]
  void* out;              // [T, Hq, D]
  int64_t q_stride, k_stride, v_stride, out_stride;
  int32_t type;           // of all four: 0 float32, 1 bfloat16, 2 float16
};
}
