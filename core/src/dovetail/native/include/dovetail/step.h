// Compiled steps: one call computes a whole step, with operations from several plugins' libraries.
//
// A step is a list of operations, each divided into pieces. A team of threads executes the list: in each operation every thread
// takes pieces until none is left, then waits until all are done. A thread that the system does not schedule is not waited for:
// the others do its share. The result of an operation must not depend on which thread computes a piece, or when.
//
// The layout of these structs is the contract (interfaces/compiled.py states its version); fields are added at the end.
#pragma once

#include <cstdint>

extern "C" {

struct dovetail_step {
  int32_t num_tokens, num_threads;
  const int64_t* token_ids;       // [num_tokens]
  const int64_t* positions;       // [num_tokens]
  const void* const* attention;   // by layer: the attention backend's plan (CompiledAttention.address)
};

struct dovetail_op {
  // Returns the number of pieces in this step; 0 if there is nothing to do. Called by every thread, with the same result.
  int32_t (*pieces)(const void* self, const dovetail_step* step);
  // Computes one piece. `thread` is below step->num_threads, and no two pieces run on one thread at the same time.
  void (*piece)(const void* self, const dovetail_step* step, int32_t piece, int32_t thread);
  const void* self;
};

// The operands of one layer's attention. Strides are in elements, from token to token; the heads of a token are contiguous.
struct dovetail_attention_call {
  const void *q, *k, *v;  // [T, Hq, D], [T, Hkv, D], [T, Hkv, D]
  void* out;              // [T, Hq, D]
  int64_t q_stride, k_stride, v_stride, out_stride;
  int32_t type;           // of all operands: 0 float32, 1 bfloat16, 2 float16
};
}
