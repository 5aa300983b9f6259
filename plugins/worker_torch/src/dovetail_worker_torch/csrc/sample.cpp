// Sampling tokens from logits f32[R, V]; rows are `stride` elements apart. noise.py and sampler.py say what is computed.
#include <dovetail/vec.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <functional>
#include <iterator>
#include <utility>
#include <vector>

#include "threads.h"

using namespace dovetail;

namespace {

constexpr int64_t kWorthThreads = 1 << 15;  // logits; below, waking a thread costs more than it saves
constexpr int64_t kPart = 1 << 13;          // logits of a row that one thread takes at a time
constexpr float kMasked = -kInf;

// f(row) for each row, or part of one.
template <class F>
void for_each(Team* team, int64_t logits, int num_threads, int64_t count, F&& f) {
  on_threads(team, logits < kWorthThreads ? 1 : num_threads, static_cast<int>(count), f);
}

// Natural logarithm of positive normal numbers, within 2 units in the last place: 2 atanh((m - 1) / (m + 1)) of a mantissa m
// between sqrt(1/2) and sqrt(2), plus the exponent's part.
inline Vec log_of(Vec x) {
  constexpr uint32_t kRootHalf = 0x3F3504F3u;
  uint32_t bits[kLanes];
  float exponent[kLanes], mantissa[kLanes];
  store(mantissa, x);
  std::memcpy(bits, mantissa, sizeof bits);
  for (int i = 0; i < kLanes; ++i) exponent[i] = static_cast<float>(static_cast<int32_t>(bits[i] - kRootHalf) >> 23);
  for (int i = 0; i < kLanes; ++i) bits[i] = ((bits[i] - kRootHalf) & 0x007FFFFFu) + kRootHalf;
  std::memcpy(mantissa, bits, sizeof bits);
  const Vec m = load(mantissa), one = splat(1.f);
  const Vec s = div(sub(m, one), add(m, one)), q = mul(s, s);
  Vec series = fma(q, splat(2.f / 9), splat(2.f / 7));
  series = fma(series, q, splat(2.f / 5));
  series = fma(series, q, splat(2.f / 3));
  return fma(load(exponent), splat(0.69314718f), fma(mul(s, q), series, add(s, s)));
}

// -log of the exponential noise of the tokens from `token` on.
inline Vec noise(uint32_t token, uint32_t low, uint32_t high) {
  uint32_t hash[kLanes];
  float u[kLanes], e[kLanes], lost[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    uint32_t h = (token + static_cast<uint32_t>(i)) * 0x9E3779B1u + low;
    h ^= h >> 16;
    h *= 0x85EBCA6Bu;
    h ^= high;
    h ^= h >> 13;
    h *= 0xC2B2AE35u;
    h ^= h >> 16;
    hash[i] = h & 0x7FFFFFFFu;
  }
  for (int i = 0; i < kLanes; ++i)
    u[i] = (static_cast<float>(static_cast<int32_t>(hash[i])) + 0.5f) * (0x1p-31f * (1.f - 0x1p-24f));
  // e = -log(1 - u); what 1 - u loses of a small u is made up for by the factor u / (what is left of it).
  const Vec rest = sub(splat(1.f), load(u)), left = sub(splat(1.f), rest);
  store(lost, left);
  store(e, mul(log_of(rest), div(load(u), left)));
  for (int i = 0; i < kLanes; ++i) e[i] = lost[i] == 0.f ? u[i] : -e[i];
  return sub(splat(0.f), log_of(load(e)));
}

float highest(const float* x, int64_t count) {
  Vec top = splat(kMasked);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) top = max(load(x + i), top);
  float best = reduce_max(top);
  for (; i < count; ++i) best = x[i] > best ? x[i] : best;
  return best;
}

bool holds_nan(const float* x, int64_t count) {
  Vec sum = splat(0.f);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) sum = fma(load(x + i), splat(0.f), sum);  // NaN also where x is infinite
  const float any = reduce_add(sum);
  return std::any_of(x + (any == any ? i : 0), x + count, [](float f) { return f != f; });
}

int64_t first_of(const float* x, int64_t count, float value) {
  int64_t i = 0;
  while (i + kPart <= count && highest(x + i, kPart) < value) i += kPart;
  return std::find(x + i, x + count, value) - x;
}

// Mask what is less than the k-th largest.
void cut_top_k(float* x, int64_t vocab, int64_t k) {
  // The k-th largest of the maxima of parts is a lower bound; few values are left above it.
  const int64_t part = std::max<int64_t>(1, vocab / (8 * k));
  std::vector<float> values;
  for (int64_t i = 0; i < vocab; i += part) values.push_back(highest(x + i, std::min(part, vocab - i)));
  std::nth_element(values.begin(), values.begin() + (k - 1), values.end(), std::greater<>());
  const float bound = values[k - 1];
  values.clear();
  std::copy_if(x, x + vocab, std::back_inserter(values), [=](float f) { return f >= bound; });
  std::nth_element(values.begin(), values.begin() + (k - 1), values.end(), std::greater<>());
  const float last = values[k - 1];
  for (int64_t i = 0; i < vocab; ++i) x[i] = x[i] < last ? kMasked : x[i];
}

float sum_of_exponentials(const float* x, int64_t count, float top) {
  Vec sum = splat(0.f);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) sum = add(sum, exp2(mul(sub(load(x + i), splat(top)), splat(1.44269504f))));
  float rest = 0;
  for (; i < count; ++i) rest += std::exp(x[i] - top);
  return reduce_add(sum) + rest;
}

// Keep the fewest of the row's tokens whose probabilities sum to at least `p`; of equals, the first.
void cut_top_p(float* x, int64_t vocab, float p) {
  const float top = highest(x, vocab);
  double total = 0;
  for (int64_t i = 0; i < vocab; i += kPart) total += sum_of_exponentials(x + i, std::min(kPart, vocab - i), top);
  // All tokens below this one together have less than 1 - p: they are cut without being put in order.
  const auto floor = static_cast<float>(top + std::log((1.0 - p) * total / static_cast<double>(vocab)));
  std::vector<std::pair<float, int64_t>> order;
  for (int64_t i = 0; i < vocab; ++i)
    if (x[i] >= floor) order.emplace_back(-x[i], i);
  std::sort(order.begin(), order.end());
  double before = 0;
  size_t kept = 0;
  for (; kept < order.size() && before < p * total; ++kept) before += std::exp(-order[kept].first - top);
  std::fill_n(x, vocab, kMasked);
  for (size_t j = 0; j < kept; ++j) x[order[j].second] = -order[j].first;
}

}  // namespace

extern "C" {

// The first best token of each row, and whether the row is free of NaN.
void dovetail_argmax(const float* logits, int64_t stride, int64_t num_rows, int64_t vocab, int64_t* tokens, uint8_t* usable,
                   int num_threads, Team* team) {
  for_each(team, num_rows * vocab, num_threads, num_rows, [&](int64_t row) {
    const float* x = logits + row * stride;
    const bool good = !holds_nan(x, vocab);
    usable[row] = good;
    tokens[row] = good ? first_of(x, vocab, highest(x, vocab)) : 0;
  });
}

// x -= log(exponential noise), keyed by row and token.
void dovetail_add_gumbel_noise(float* logits, int64_t stride, int64_t num_rows, int64_t vocab, const uint64_t* keys, int num_threads,
                      Team* team) {
  const int64_t parts = (vocab + kPart - 1) / kPart;
  for_each(team, num_rows * vocab, num_threads, num_rows * parts, [&](int64_t i) {
    float* x = logits + i / parts * stride;
    const auto low = static_cast<uint32_t>(keys[i / parts]), high = static_cast<uint32_t>(keys[i / parts] >> 32);
    const auto begin = static_cast<uint32_t>(i % parts * kPart), end = static_cast<uint32_t>(std::min(vocab, (i % parts + 1) * kPart));
    uint32_t token = begin;
    for (; token + kLanes <= end; token += kLanes) store(x + token, add(load(x + token), noise(token, low, high)));
    float rest[kLanes];
    store(rest, noise(token, low, high));
    for (int i = 0; token < end; ++token, ++i) x[token] += rest[i];
  });
}

// Mask all but the top_k (0: all; equals of the last are kept), then all but the nucleus of top_p (1: all).
void dovetail_filter_top_k_top_p(float* logits, int64_t stride, int64_t num_rows, int64_t vocab, const int64_t* top_k, const float* top_p,
                  int num_threads, Team* team) {
  for_each(team, num_rows * vocab, num_threads, num_rows, [&](int64_t row) {
    float* x = logits + row * stride;
    if (holds_nan(x, vocab)) return;  // the sample will say so
    const int64_t k = top_k[row];
    if (k > 0 && k < vocab) cut_top_k(x, vocab, k);
    if (top_p[row] < 1.f) cut_top_p(x, vocab, top_p[row]);
  });
}
}
