// The operations between a layer's linears and its attention. Each struct is an operation's `self`, filled in by native.py.
//
// A buffer's rows are tokens, `stride` elements apart; what lies between a row's last element and its stride stays zero.
// Rounding to the model's type is where a plain implementation has it: after a norm and after its weight, after a sum.
#pragma once

#include "linear.h"

namespace dovetail {

struct LinearOp {
  const Linear* linear;
  LinearCall call;
};

// hidden[t] = the embedding of token t, and angles[t] = the cosines, then the sines of its position's rotation.
struct EmbedOp {
  const Linear* embedding;
  void* hidden;
  int64_t hidden_stride;
  const float* inv_freq;  // [num_pairs], radians per token
  float* angles;          // [T, 2 * num_pairs]
  float rope_scale;       // factor on both
  int32_t num_pairs;
};

// hidden += delta (if there is one); out = rms_norm(hidden) * weight.
struct NormOp {
  void* hidden;
  const void* delta;
  void* out;
  const void* weight;  // [stride], zero behind `size`
  int64_t stride;      // of all three
  int32_t size;
  float eps;
  Type type;
};

// Each of the first `num_heads` heads of x: (norm, times weight, then) rotated, in place. Pairs are (i, i + D / 2).
struct RotateOp {
  void* x;  // [T, num_heads or more, D]
  int64_t stride;
  const void* norm_weight;  // [num_heads, D] or null
  const float* angles;      // as EmbedOp leaves them
  int32_t num_heads, head_size;
  float eps;
  Type type;
};

enum class Activation : int { silu, gelu, gelu_tanh, relu };

// out = activation(x[:, :size]) * x[:, size:]
struct GateOp {
  const void* x;
  void* out;
  int64_t x_stride, out_stride;
  int32_t size;
  Activation activation;
  Type type;
};

}  // namespace dovetail
