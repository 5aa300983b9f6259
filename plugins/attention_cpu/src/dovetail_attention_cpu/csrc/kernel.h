// Paged attention on a CPU: declarations that plan.cpp, cache.cpp and kernel.cpp share. No tensor library is used.
//
// A block of one KV head holds its keys, then its values, in groups of 16 tokens (`kGroup`), 16 * D elements each:
//   keys    [D / pair][16 tokens][pair]    one vector load reads one dimension (or a pair) of 16 keys: no sum across lanes
//   values  [16 / pair][D][pair]           one vector load reads 16 dimensions of one token (or of a pair of tokens)
#pragma once

#include <dovetail/element.h>
#include <dovetail/step.h>

#include <cstdint>
#include <vector>

namespace dovetail {

constexpr int kGroup = 16;  // keys that the cache interleaves, one per vector lane
constexpr double kWorthThreads = 400e3;  // multiply-adds; below, waking and feeding threads costs more than it saves
constexpr int kTile = 256;  // keys between two updates of the running maximum; tiles start at multiples of it

// A tensor [T, heads, D] whose last dimension is contiguous. Strides are in elements.
struct Rows {
  void* data;
  int64_t token_stride, head_stride;
  Type type;
};

struct Geometry {
  int num_heads, num_kv_heads, head_size, block_size;
  int window;  // 0: none

  int group() const { return num_heads / num_kv_heads; }
};

// A work item: a tile of one row's queries and the key tiles [tile_begin, tile_end), for one KV head.
struct Item {
  int32_t row, head;
  int32_t token, num_queries;  // first token in the step, and the number of tokens
  int32_t position;            // of the first query in its sequence
  int32_t tile_begin, tile_end;
  int32_t job;  // index into Step::jobs if the keys are split over items, else -1
};

// A query tile whose keys are split. Every key tile writes a partial result, and these are merged in order.
struct Job {
  Item all;
  int64_t partials;  // offset in floats
};

struct Step {
  Geometry geometry;
  std::vector<Item> items;
  std::vector<Job> jobs;
  int num_tokens = 0, num_threads = 1, max_rows = 1;
  int64_t partial_floats = 0;
  double cost = 0;  // multiply-adds
  const int32_t* block_table = nullptr;
  int64_t block_table_stride = 0;
  const int64_t* slots = nullptr;
  char* workspace = nullptr;  // num_threads * scratch_bytes, then partial_floats floats; 64-byte aligned
};

struct Cache {
  void* data;  // [num_blocks, Hkv, 2, block_size, D] in the packed layout
  Type type;
};

struct LayerArgs {
  float scale, soft_cap;  // soft_cap 0: none
  const float* sinks;     // [Hq] or null
  const float* kv_scales;  // of keys and of values, for a one-byte cache; null: 1
};

// Partitions the work of a step. `query_start` has num_seqs + 1 entries.
void make_step(Step& step, const std::vector<int32_t>& query_start, const std::vector<int32_t>& seq_lens, int num_threads);

int64_t scratch_bytes(const Step& step);  // for one thread

// The operands of one layer's three phases, fixed for one step or for many.
struct Layer {
  LayerArgs args;
  Rows q, k, v, out;
  Cache cache;
  int index = 0;  // index of this layer's Step in dovetail_step::attention
};

// The phases of a layer, in order, each divided into pieces (dovetail/step.h). All keys and values are written before any is
// read, because rows of one step may share blocks. `merge` combines query tiles whose keys were split.
enum class Phase { write, attend, merge };
int num_pieces(const Step& step, Phase phase);
void do_piece(const Step& step, const Layer& layer, Phase phase, int piece, int thread);

// Runs all three phases, on step.num_threads threads.
void run(const Step& step, const Layer& layer);

// Copy tokens to and from the cache. `run` uses quantize_tokens, which divides keys and values by their scales and clamps them to
// the range of the type if the cache has a one-byte type. Import and export of blocks use the other two.
void write_tokens(const Geometry& g, Cache cache, const int64_t* slots, Rows k, Rows v, int64_t begin, int64_t end);
void quantize_tokens(const Geometry& g, Cache cache, const int64_t* slots, Rows k, Rows v, const float* kv_scales, int64_t begin,
                     int64_t end);
void read_tokens(const Geometry& g, Cache cache, const int64_t* slots, Rows k, Rows v, int64_t begin, int64_t end);

const char* instruction_set();

}  // namespace dovetail
