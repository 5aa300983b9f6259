// The operations between a decoder layer's linears and its attention. Each struct is an operation's `self`, filled in by native.py.
//
// A buffer's rows are tokens, `stride` elements apart; what lies between a row's last element and its stride stays zero.
// Rounding to the model's type is where a plain implementation has it: after a norm and after its weight, after a sum.
#include <dovetail/element.h>
#include <dovetail/op.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace dovetail {
namespace {

// angles[t] = the cosines, then the sines of the rotation of token t's position.
struct AnglesOp {
  const float* inv_freq;  // [num_pairs], radians per token
  float* angles;          // [T, 2 * num_pairs]
  float scale;            // factor on both
  int32_t num_pairs;
  Type type;              // which they are rounded to
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
  const float* angles;      // as AnglesOp leaves them
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

constexpr int kMaxHead = 512;
constexpr int64_t kGrainOfAngles = 16;  // a cosine and a sine take as long as so many elements of a norm

template <class E>
Vec rounded(Vec a) {
  if constexpr (sizeof(typename E::store_t) == 4) return a;
  typename E::store_t narrow[kLanes];
  E::narrow16(narrow, a);
  return E::widen16(narrow);
}

template <class E>
float rounded(float a) {
  if constexpr (sizeof(typename E::store_t) == 4) return a;
  float lanes[kLanes];
  store(lanes, rounded<E>(splat(a)));
  return lanes[0];
}

// Factor of the norm of float32 values; `padded` covers all of them, with zeros behind.
float norm_factor(const float* x, int padded, int size, float eps) {
  Vec sum = splat(0.f);
  for (int i = 0; i < padded; i += kLanes) sum = fma(load(x + i), load(x + i), sum);
  return 1.f / std::sqrt(reduce_add(sum) / static_cast<float>(size) + eps);
}

// Angles

int32_t pieces(const AnglesOp& op, const dovetail_step* step) {
  return split(static_cast<int64_t>(step->num_tokens) * op.num_pairs * kGrainOfAngles, step->num_tokens, step->num_threads);
}

void piece(const AnglesOp& op, const dovetail_step* step, int32_t i) {
  const Share share(step->num_tokens, pieces(op, step), i);
  with_type(op.type, [&](auto e) {
    using E = decltype(e);
    for (int64_t t = share.begin; t < share.end; ++t) {
      float *cosines = op.angles + t * 2 * op.num_pairs, *sines = cosines + op.num_pairs;
      for (int p = 0; p < op.num_pairs; ++p) {
        const float angle = static_cast<float>(step->positions[t]) * op.inv_freq[p];
        cosines[p] = rounded<E>(std::cos(angle) * op.scale);
        sines[p] = rounded<E>(std::sin(angle) * op.scale);
      }
    }
  });
}

// Norm

int32_t pieces(const NormOp& op, const dovetail_step* step) {
  return split(step->num_tokens * op.stride, step->num_tokens, step->num_threads);
}

void piece(const NormOp& op, const dovetail_step* step, int32_t i) {
  const Share share(step->num_tokens, pieces(op, step), i);
  with_type(op.type, [&](auto e) {
    using E = decltype(e);
    using store_t = typename E::store_t;
    for (int64_t t = share.begin; t < share.end; ++t) {
      auto* hidden = static_cast<store_t*>(op.hidden) + t * op.stride;
      const auto* delta = static_cast<const store_t*>(op.delta) + (op.delta ? t * op.stride : 0);
      auto* out = static_cast<store_t*>(op.out) + t * op.stride;
      const auto* weight = static_cast<const store_t*>(op.weight);
      Vec sums[2] = {splat(0.f), splat(0.f)};
      for (int64_t j = 0; j < op.stride; j += 2 * kLanes)
        for (int half = 0; half < 2; ++half) {
          const int64_t at = j + half * kLanes;
          Vec x = E::widen16(hidden + at);
          if (op.delta) {
            x = rounded<E>(add(x, E::widen16(delta + at)));
            E::narrow16(hidden + at, x);
          }
          sums[half] = fma(x, x, sums[half]);
        }
      const float mean = reduce_add(add(sums[0], sums[1])) / static_cast<float>(op.size);
      const Vec factor = splat(1.f / std::sqrt(mean + op.eps));
      for (int64_t j = 0; j < op.stride; j += kLanes)
        E::narrow16(out + j, mul(rounded<E>(mul(E::widen16(hidden + j), factor)), E::widen16(weight + j)));
    }
  });
}

// Rotation

int32_t pieces(const RotateOp& op, const dovetail_step* step) {
  const int64_t heads = static_cast<int64_t>(step->num_tokens) * op.num_heads;
  return split(heads * op.head_size, heads, step->num_threads);
}

void piece(const RotateOp& op, const dovetail_step* step, int32_t i) {
  const Share share(static_cast<int64_t>(step->num_tokens) * op.num_heads, pieces(op, step), i);
  const int half = op.head_size / 2;
  with_type(op.type, [&](auto e) {
    using E = decltype(e);
    using store_t = typename E::store_t;
    alignas(64) float head[kMaxHead], turned[kMaxHead];
    for (int64_t unit = share.begin; unit < share.end; ++unit) {
      const int64_t t = unit / op.num_heads, h = unit % op.num_heads;
      auto* x = static_cast<store_t*>(op.x) + t * op.stride + h * op.head_size;
      for (int d = 0; d < op.head_size; d += kLanes) store(head + d, E::widen16(x + d));
      if (op.norm_weight) {
        const auto* weight = static_cast<const store_t*>(op.norm_weight) + h * op.head_size;
        const Vec factor = splat(norm_factor(head, op.head_size, op.head_size, op.eps));
        for (int d = 0; d < op.head_size; d += kLanes)
          store(head + d, rounded<E>(mul(rounded<E>(mul(load(head + d), factor)), E::widen16(weight + d))));
      }
      const float *cosines = op.angles + t * op.head_size, *sines = cosines + half;
      for (int d = 0; d < half; ++d) {
        turned[d] = head[d] * cosines[d] - head[d + half] * sines[d];
        turned[d + half] = head[d + half] * cosines[d] + head[d] * sines[d];
      }
      for (int d = 0; d < op.head_size; d += kLanes) E::narrow16(x + d, load(turned + d));
    }
  });
}

// Gate

int32_t pieces(const GateOp& op, const dovetail_step* step) {
  return split(static_cast<int64_t>(step->num_tokens) * op.size, step->num_tokens, step->num_threads);
}

float activate(Activation activation, float x) {
  switch (activation) {
    case Activation::gelu: return 0.5f * x * (1.f + std::erf(x * 0.70710678f));
    case Activation::gelu_tanh: return 0.5f * x * (1.f + std::tanh(0.79788456f * (x + 0.044715f * x * x * x)));
    case Activation::relu: return std::max(x, 0.f);
    default: return x / (1.f + std::exp(-x));
  }
}

Vec activate(Activation activation, Vec x) {
  if (activation == Activation::silu) {
    constexpr float kLog2E = 1.4426950408889634f;
    return div(x, add(splat(1.f), exp2(min(splat(126.f), mul(x, splat(-kLog2E))))));
  }
  alignas(64) float lanes[kLanes];
  store(lanes, x);
  for (float& lane : lanes) lane = activate(activation, lane);
  return load(lanes);
}

void piece(const GateOp& op, const dovetail_step* step, int32_t i) {
  const Share share(step->num_tokens, pieces(op, step), i);
  with_type(op.type, [&](auto e) {
    using E = decltype(e);
    using store_t = typename E::store_t;
    for (int64_t t = share.begin; t < share.end; ++t) {
      const auto* gate = static_cast<const store_t*>(op.x) + t * op.x_stride;
      const auto* up = gate + op.size;
      auto* out = static_cast<store_t*>(op.out) + t * op.out_stride;
      auto gated = [&](const store_t* a, const store_t* b) {
        return mul(rounded<E>(activate(op.activation, E::widen16(a))), E::widen16(b));
      };
      int d = 0;
      for (; d + kLanes <= op.size; d += kLanes) E::narrow16(out + d, gated(gate + d, up + d));
      if (const int rest = op.size - d) {
        store_t a[kLanes] = {}, b[kLanes] = {}, c[kLanes];
        std::copy_n(gate + d, rest, a);
        std::copy_n(up + d, rest, b);
        E::narrow16(c, gated(a, b));
        std::copy_n(c, rest, out + d);
      }
    }
  });
}

}  // namespace

extern "C" {
void dovetail_angles_op(dovetail_op* op, const AnglesOp* self) { describe<AnglesOp>(op, self); }
void dovetail_norm_op(dovetail_op* op, const NormOp* self) { describe<NormOp>(op, self); }
void dovetail_rotate_op(dovetail_op* op, const RotateOp* self) { describe<RotateOp>(op, self); }
void dovetail_gate_op(dovetail_op* op, const GateOp* self) { describe<GateOp>(op, self); }
}

}  // namespace dovetail
