// PagedAttention in CUDA C++, for systems without Triton: one pass over the context of a token, or the context split over thread
// blocks and merged (versions 1 and 2 of arXiv:2309.06180). Every query token is a separate row, so prefill is correct but slow.
//
// A block of four warps computes one token and up to four query heads of one key/value head. Eight lanes share a key: each has
// vectors of eight elements, 64 apart, of the key, the value, the queries and the sums. A warp therefore reads four keys at a time,
// and each group of eight lanes has its own softmax state, merged at the end.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#ifndef DOVETAIL_LAUNCH  // the tests run the kernels on a CPU
#define DOVETAIL_LAUNCH(kernel, grid, threads, stream, call) kernel<<<grid, threads, 0, stream>>>(call)
#endif

namespace {

constexpr int kLanes = 8, kVector = 8, kChunk = kLanes * kVector, kWarps = 4, kThreads = 32 * kWarps;
constexpr float kLog2e = 1.4426950408889634f;

enum Type : int32_t { kFloat = 0, kBfloat16 = 1, kHalf = 2, kInt8 = 3, kFloat8 = 4 };

}  // namespace

// The same layout as `Call` in dovetail_attention_cuda/native.py. Strides are in elements.
struct Call {
  const void *q, *k, *v;
  void *out, *keys, *values;
  const int32_t *query_start, *seq_lens, *table;
  const int64_t *slots;
  const float *sinks, *kv_scales;
  float *sums, *tops, *weights;  // [tokens, query heads, splits, D] and [tokens, query heads, splits]
  int64_t q_token, q_head, k_token, k_head, v_token, v_head, out_token, out_head, table_row;
  float scale, soft_cap;
  int32_t window, type, kv_type, num_tokens, num_rows, num_heads, num_kv_heads, head_size, block_size, splits;
};

namespace {

__device__ float load(const void *from, int64_t at, int type) {
  if (type == kFloat) return static_cast<const float *>(from)[at];
  if (type == kBfloat16) return __bfloat162float(static_cast<const __nv_bfloat16 *>(from)[at]);
  return __half2float(static_cast<const __half *>(from)[at]);
}

__device__ void store(void *to, int64_t at, int type, float x) {
  if (type == kFloat) static_cast<float *>(to)[at] = x;
  else if (type == kBfloat16) static_cast<__nv_bfloat16 *>(to)[at] = __float2bfloat16_rn(x);
  else static_cast<__half *>(to)[at] = __float2half_rn(x);
}

// Load eight consecutive elements of a cache as float32.
__device__ void load8(const float *from, float (&x)[kVector]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float4 v = reinterpret_cast<const float4 *>(from)[half];
    x[4 * half] = v.x, x[4 * half + 1] = v.y, x[4 * half + 2] = v.z, x[4 * half + 3] = v.w;
  }
}

template <class Pair>
__device__ void load_pairs(const void *from, float (&x)[kVector], float2 (*wide)(Pair)) {
  const uint4 v = *static_cast<const uint4 *>(from);
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    Pair pair;
    memcpy(static_cast<void *>(&pair), &words[i], sizeof pair);
    const float2 two = wide(pair);
    x[2 * i] = two.x, x[2 * i + 1] = two.y;
  }
}

__device__ float2 wide_bfloat16(__nv_bfloat162 v) { return __bfloat1622float2(v); }
__device__ float2 wide_half(__half2 v) { return __half22float2(v); }

__device__ void load8(const __nv_bfloat16 *from, float (&x)[kVector]) { load_pairs<__nv_bfloat162>(from, x, wide_bfloat16); }
__device__ void load8(const __half *from, float (&x)[kVector]) { load_pairs<__half2>(from, x, wide_half); }

__device__ void load8(const int8_t *from, float (&x)[kVector]) {
  const uint2 v = *reinterpret_cast<const uint2 *>(from);
  const uint32_t words[2] = {v.x, v.y};
#pragma unroll
  for (int i = 0; i < kVector; ++i) x[i] = static_cast<float>(static_cast<int8_t>(words[i / 4] >> (8 * (i % 4))));
}

__device__ void load8(const __nv_fp8_storage_t *from, float (&x)[kVector]) {
  const uint2 v = *reinterpret_cast<const uint2 *>(from);
  const uint32_t words[2] = {v.x, v.y};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const __half2_raw pair = __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(words[i / 2] >> (16 * (i % 2))), __NV_E4M3);
    const float2 two = __half22float2(__half2(pair));
    x[2 * i] = two.x, x[2 * i + 1] = two.y;
  }
}

// Returns the row of a token: the last one whose query start is not after the token.
__device__ int row_of(const Call &c, int token) {
  if (c.num_tokens == c.num_rows) return token;
  int low = 0, high = c.num_rows - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (c.query_start[middle] <= token) low = middle;
    else high = middle - 1;
  }
  return low;
}

// Writes keys and values to the cache. One thread block writes all heads of one token.
__global__ void write_kv(Call c) {
  const int token = blockIdx.x, size = c.num_kv_heads * c.head_size;
  const int64_t slot = c.slots[token], block = slot / c.block_size, offset = slot % c.block_size;
  const float scales[2] = {c.kv_scales ? c.kv_scales[0] : 1.f, c.kv_scales ? c.kv_scales[1] : 1.f};
  for (int i = threadIdx.x; i < 2 * size; i += blockDim.x) {
    const int which = i / size, head = i % size / c.head_size, d = i % c.head_size;
    const void *from = which ? c.v : c.k;
    const int64_t at = which ? token * c.v_token + head * c.v_head + d : token * c.k_token + head * c.k_head + d;
    const int64_t to = ((block * c.num_kv_heads + head) * c.block_size + offset) * c.head_size + d;
    void *cache = which ? c.values : c.keys;
    const float x = load(from, at, c.type);
    if (c.kv_type < kInt8) {
      store(cache, to, c.kv_type, x);
      continue;
    }
    const float scaled = __fdiv_rn(x, scales[which]);
    if (c.kv_type == kInt8) {
      static_cast<int8_t *>(cache)[to] = isnan(scaled) ? 0 : static_cast<int8_t>(rintf(fminf(fmaxf(scaled, -127.f), 127.f)));
    } else {
      static_cast<__nv_fp8_storage_t *>(cache)[to] = __nv_cvt_float_to_fp8(scaled, __NV_SATFINITE, __NV_E4M3);
    }
  }
}

// The running state of an online softmax. Sums are relative to 2^top.
template <int kHeads, int kChunks>
struct Softmax {
  float sum[kHeads][kChunks][kVector], top[kHeads], weight[kHeads];
};

__device__ float relative(float top, float new_top) { return top == -INFINITY ? 0.f : exp2f(top - new_top); }

template <class KV, int kChunks, int kHeads>
__global__ void __launch_bounds__(kThreads) attend(Call c) {
  const int group = c.num_heads / c.num_kv_heads, parts = (group + kHeads - 1) / kHeads;
  const int token = blockIdx.x, kv_head = blockIdx.y / parts, first = kv_head * group + blockIdx.y % parts * kHeads;
  const int num_heads = min(kHeads, (kv_head + 1) * group - first), split = blockIdx.z;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, sub = lane / kLanes, column = lane % kLanes * kVector;
  const int row = row_of(c, token);
  const int length = c.seq_lens[row] - (c.query_start[row + 1] - 1 - token);
  const int visible = c.window > 0 ? max(0, length - c.window) : 0;
  const int share = ((length - visible + c.splits - 1) / c.splits + 15) / 16 * 16;
  const int begin = visible + split * share, end = min(length, begin + share);

  const float k_scale = c.kv_scales ? c.kv_scales[0] : 1.f, v_scale = c.kv_scales ? c.kv_scales[1] : 1.f;
  const float scale = c.scale * k_scale;
  float q[kHeads][kChunks][kVector];
  Softmax<kHeads, kChunks> s;
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    s.top[h] = -INFINITY, s.weight[h] = 0.f;
#pragma unroll
    for (int j = 0; j < kChunks; ++j)
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const int d = j * kChunk + column + i;
        const bool inside = h < num_heads && d < c.head_size;
        q[h][j][i] = inside ? load(c.q, token * c.q_token + (first + h) * c.q_head + d, c.type) : 0.f;
        s.sum[h][j][i] = 0.f;
      }
  }

  const KV *keys = static_cast<const KV *>(c.keys), *values = static_cast<const KV *>(c.values);
  const int32_t *table = c.table + row * c.table_row;
  for (int at = begin + warp * 4; at < end; at += 4 * kWarps) {
    const int key = at + sub;
    const bool is_key = key < end;
    const int64_t block = is_key ? table[key / c.block_size] : 0;
    const int64_t base = ((block * c.num_kv_heads + kv_head) * c.block_size + key % c.block_size) * c.head_size;
    float k[kChunks][kVector], v[kChunks][kVector];
#pragma unroll
    for (int j = 0; j < kChunks; ++j) {
      const int d = j * kChunk + column;
      if (is_key && d < c.head_size) {
        load8(keys + base + d, k[j]);
        load8(values + base + d, v[j]);
      } else {
#pragma unroll
        for (int i = 0; i < kVector; ++i) k[j][i] = v[j][i] = 0.f;
      }
    }
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      float logit = 0.f;
#pragma unroll
      for (int j = 0; j < kChunks; ++j)
#pragma unroll
        for (int i = 0; i < kVector; ++i) logit += q[h][j][i] * k[j][i];
#pragma unroll
      for (int other = kLanes / 2; other > 0; other /= 2) logit += __shfl_xor_sync(0xffffffffu, logit, other);
      logit *= scale;
      if (c.soft_cap > 0.f) logit = c.soft_cap * tanhf(logit / c.soft_cap);
      logit *= kLog2e;
      if (is_key) {
        if (logit > s.top[h]) {
          const float shrink = relative(s.top[h], logit);
          s.top[h] = logit, s.weight[h] *= shrink;
#pragma unroll
          for (int j = 0; j < kChunks; ++j)
#pragma unroll
            for (int i = 0; i < kVector; ++i) s.sum[h][j][i] *= shrink;
        }
        const float weight = exp2f(logit - s.top[h]);
        s.weight[h] += weight;
#pragma unroll
        for (int j = 0; j < kChunks; ++j)
#pragma unroll
          for (int i = 0; i < kVector; ++i) s.sum[h][j][i] += weight * v[j][i];
      }
    }
  }

  // Merge the four lane groups of a warp, then the warps.
  __shared__ float sums[kWarps][kHeads][kChunks * kChunk], tops[kWarps][kHeads], weights[kWarps][kHeads];
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    float top = s.top[h];
#pragma unroll
    for (int other = kLanes; other < 32; other *= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, other));
    const float shrink = relative(s.top[h], top);
    float weight = s.weight[h] * shrink;
#pragma unroll
    for (int other = kLanes; other < 32; other *= 2) weight += __shfl_xor_sync(0xffffffffu, weight, other);
    if (lane == 0) tops[warp][h] = top, weights[warp][h] = weight;
#pragma unroll
    for (int j = 0; j < kChunks; ++j)
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        float sum = s.sum[h][j][i] * shrink;
#pragma unroll
        for (int other = kLanes; other < 32; other *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, other);
        if (sub == 0) sums[warp][h][j * kChunk + column + i] = sum;
      }
  }
  __syncthreads();
  for (int n = threadIdx.x; n < num_heads * c.head_size; n += kThreads) {
    const int h = n / c.head_size, d = n % c.head_size;
    float top = -INFINITY, weight = 0.f, sum = 0.f;
    for (int w = 0; w < kWarps; ++w) top = fmaxf(top, tops[w][h]);
    const bool is_last = c.splits == 1;
    if (is_last && c.sinks) top = fmaxf(top, c.sinks[first + h] * kLog2e);
    for (int w = 0; w < kWarps; ++w) {
      const float shrink = relative(tops[w][h], top);
      weight += weights[w][h] * shrink, sum += sums[w][h][d] * shrink;
    }
    if (is_last) {
      if (c.sinks) weight += exp2f(c.sinks[first + h] * kLog2e - top);
      store(c.out, token * c.out_token + (first + h) * c.out_head + d, c.type, sum / weight * v_scale);
    } else {
      const int64_t place = (static_cast<int64_t>(token) * c.num_heads + first + h) * c.splits + split;
      c.sums[place * c.head_size + d] = sum;
      if (d == 0) c.tops[place] = top, c.weights[place] = weight;
    }
  }
}

// Merges the partial results of one token and query head per thread block.
__global__ void merge(Call c) {
  const int token = blockIdx.x, head = blockIdx.y;
  const int64_t place = (static_cast<int64_t>(token) * c.num_heads + head) * c.splits;
  const float v_scale = c.kv_scales ? c.kv_scales[1] : 1.f;
  float top = c.sinks ? c.sinks[head] * kLog2e : -INFINITY;
  for (int i = 0; i < c.splits; ++i) top = fmaxf(top, c.tops[place + i]);
  float weight = c.sinks ? exp2f(c.sinks[head] * kLog2e - top) : 0.f;
  for (int i = 0; i < c.splits; ++i) weight += c.weights[place + i] * relative(c.tops[place + i], top);
  for (int d = threadIdx.x; d < c.head_size; d += blockDim.x) {
    float sum = 0.f;
    for (int i = 0; i < c.splits; ++i) sum += c.sums[(place + i) * c.head_size + d] * relative(c.tops[place + i], top);
    store(c.out, token * c.out_token + head * c.out_head + d, c.type, sum / weight * v_scale);
  }
}

template <class KV, int kChunks>
void launch(const Call &c, cudaStream_t stream) {
  constexpr int kSome = kChunks > 2 ? 2 : 4;  // limited by registers
  const int group = c.num_heads / c.num_kv_heads, heads = group == 1 ? 1 : kSome;
  const auto kernel = group == 1 ? attend<KV, kChunks, 1> : attend<KV, kChunks, kSome>;
  const dim3 grid(c.num_tokens, c.num_kv_heads * ((group + heads - 1) / heads), c.splits);
  DOVETAIL_LAUNCH(kernel, grid, kThreads, stream, c);
}

template <class KV>
void launch(const Call &c, cudaStream_t stream) {
  switch ((c.head_size + kChunk - 1) / kChunk) {
    case 1: return launch<KV, 1>(c, stream);
    case 2: return launch<KV, 2>(c, stream);
    case 3: return launch<KV, 3>(c, stream);
    default: return launch<KV, 4>(c, stream);
  }
}

}  // namespace

// Returns cudaGetLastError(): 0 if all launches succeeded.
extern "C" int dovetail_paged_attention(const Call *call, void *stream_pointer) {
  const Call &c = *call;
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  if (c.num_tokens == 0) return 0;
  DOVETAIL_LAUNCH(write_kv, dim3(c.num_tokens), 256, stream, c);
  switch (c.kv_type) {
    case kFloat: launch<float>(c, stream); break;
    case kBfloat16: launch<__nv_bfloat16>(c, stream); break;
    case kHalf: launch<__half>(c, stream); break;
    case kInt8: launch<int8_t>(c, stream); break;
    default: launch<__nv_fp8_storage_t>(c, stream); break;
  }
  if (c.splits > 1) DOVETAIL_LAUNCH(merge, dim3(c.num_tokens, c.num_heads), 128, stream, c);
  return cudaGetLastError();
}

extern "C" const char *dovetail_cuda_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }
