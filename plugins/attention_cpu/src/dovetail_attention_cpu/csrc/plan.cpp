// Partition the work of a step into query tiles, and split keys over work items if there are too few tiles for the threads.
//
// Splitting never changes a result: each key tile (256 positions, at multiples of 256) is computed independently and merged in
// order, whether by one item or by several. This fixed-size split makes the kernel batch invariant.
#include <algorithm>
#include <numeric>

#include "kernel.h"

namespace dovetail {
namespace {

constexpr int kRows = 96;                 // rows of a query tile (queries × heads of a group): their logits stay in L2
constexpr double kImbalance = 1.15;       // ratio of the busiest thread's load to the mean above which keys are split

// Returns the load of the busiest thread if items are assigned in order, each to the least loaded thread.
double makespan(const std::vector<double>& costs, int num_threads) {
  std::vector<double> busy(num_threads, 0.0);
  for (double c : costs) *std::min_element(busy.begin(), busy.end()) += c;
  return *std::max_element(busy.begin(), busy.end());
}

}  // namespace

void make_step(Step& step, const std::vector<int32_t>& query_start, const std::vector<int32_t>& seq_lens, int num_threads) {
  const Geometry& g = step.geometry;
  const int queries_per_tile = std::max(1, kRows / g.group());
  std::vector<Item> tiles;
  std::vector<double> costs;  // of one KV head
  int max_queries = 1;
  for (int row = 0; row < static_cast<int>(seq_lens.size()); ++row) {
    const int begin = query_start[row], end = query_start[row + 1];
    const int first_position = seq_lens[row] - (end - begin);
    for (int token = begin; token < end; token += queries_per_tile) {
      const int n = std::min(queries_per_tile, end - token), position = first_position + token - begin;
      const int from = g.window ? std::max(0, position - g.window + 1) : 0, to = position + n;
      tiles.push_back({row, 0, token, n, position, from / kTile, (to + kTile - 1) / kTile, -1});
      costs.push_back(2.0 * n * g.group() * g.head_size * (to - from));
      max_queries = std::max(max_queries, n);
    }
  }
  step.max_rows = max_queries * g.group();
  step.num_tokens = query_start.back();
  step.cost = std::accumulate(costs.begin(), costs.end(), 0.0) * g.num_kv_heads;
  step.num_threads = num_threads;

  std::vector<int> order(tiles.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return costs[a] > costs[b]; });

  const double share = step.cost / step.num_threads;
  bool split = false;
  if (step.num_threads > 1 && step.cost >= kWorthThreads && costs[order.front()] > (kImbalance - 1) * share) {
    std::vector<double> sorted;
    for (int i : order) sorted.insert(sorted.end(), g.num_kv_heads, costs[i]);
    split = makespan(sorted, step.num_threads) > kImbalance * share;
  }
  for (int i : order)
    for (int head = 0; head < g.num_kv_heads; ++head) {
      Item item = tiles[i];
      item.head = head;
      const int key_tiles = item.tile_end - item.tile_begin;
      const int pieces = split ? std::clamp(static_cast<int>(costs[i] / (share / 4)), 1, key_tiles) : 1;
      if (pieces == 1) {
        step.items.push_back(item);
        continue;
      }
      const int job = static_cast<int>(step.jobs.size());
      step.jobs.push_back({item, step.partial_floats});
      step.partial_floats += static_cast<int64_t>(key_tiles) * item.num_queries * g.group() * (g.head_size + 2);
      for (int p = 0; p < pieces; ++p) {
        Item piece = item;
        piece.job = job;
        piece.tile_begin = item.tile_begin + key_tiles * p / pieces;
        piece.tile_end = item.tile_begin + key_tiles * (p + 1) / pieces;
        step.items.push_back(piece);
      }
    }
}

}  // namespace dovetail
