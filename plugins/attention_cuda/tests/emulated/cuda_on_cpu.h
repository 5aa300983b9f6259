// The subset of CUDA that is needed to run the kernels on a CPU. The threads of a block are fibers that run in turn, and blocks run
// one by one.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <memory>
#include <vector>

namespace emulated {

// A fiber is entered once by its context. Later switches are jumps, which need no system call.
struct Fiber {
  ucontext_t context;
  jmp_buf place;
  bool has_begun = false;
  std::unique_ptr<char[]> stack{new char[1 << 17]};
  bool is_done = false;
};

struct Barrier {
  int arrived = 0, generation = 0;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Barrier> warps;
  Barrier all;
  std::vector<float> passed;  // values exchanged between the lanes of a warp
  std::function<void()> body;
  jmp_buf scheduler;
  int current = 0;
};

inline Block *block = nullptr;
inline dim3 block_index, block_size;

inline void yield() {
  if (_setjmp(block->fibers[block->current].place) == 0) _longjmp(block->scheduler, 1);
}

inline void wait(Barrier &barrier, int count) {
  const int generation = barrier.generation;
  if (++barrier.arrived == count) {
    barrier.arrived = 0, ++barrier.generation;
    return;
  }
  while (barrier.generation == generation) yield();
}

inline void enter() {
  block->body();
  block->fibers[block->current].is_done = true;
  yield();
}

inline void run_block(int threads, std::function<void()> body) {
  Block own;
  block = &own;
  own.fibers = std::vector<Fiber>(threads);
  own.warps.resize((threads + 31) / 32);
  own.passed.resize(threads);
  own.body = std::move(body);
  for (auto &fiber : own.fibers) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = 1 << 17;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
  }
  for (bool is_running = true; is_running;) {
    is_running = false;
    for (own.current = 0; own.current < threads; ++own.current) {
      if (own.fibers[own.current].is_done) continue;
      is_running = true;
      if (_setjmp(own.scheduler)) continue;  // it has yielded
      Fiber &fiber = own.fibers[own.current];
      if (fiber.has_begun) _longjmp(fiber.place, 1);
      fiber.has_begun = true;
      setcontext(&fiber.context);
    }
  }
  block = nullptr;
}

template <class Kernel, class Argument>
void launch(Kernel kernel, dim3 grid, int threads, const Argument &argument) {
  block_size = dim3(threads);
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        block_index = dim3(x, y, z);
        run_block(threads, [&] { kernel(argument); });
      }
}

}  // namespace emulated

inline float __shfl_xor_sync(unsigned, float value, int other) {
  using namespace emulated;
  const int me = block->current, warp = me / 32, count = std::min<int>(32, block->fibers.size() - 32 * warp);
  block->passed[me] = value;
  wait(block->warps[warp], count);
  const float given = block->passed[32 * warp + (me % 32 ^ other)];
  wait(block->warps[warp], count);
  return given;
}

inline void __syncthreads() { emulated::wait(emulated::block->all, static_cast<int>(emulated::block->fibers.size())); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline cudaError_t no_error() { return cudaSuccess; }
inline const char *no_words(cudaError_t) { return ""; }

#define threadIdx dim3(emulated::block->current, 0, 0)
#define blockIdx emulated::block_index
#define blockDim emulated::block_size
#define cudaGetLastError no_error
#define cudaGetErrorString no_words
#undef __global__
#undef __device__
#undef __shared__
#undef __launch_bounds__
#define __global__
#define __device__ inline
#define __shared__ static
#define __launch_bounds__(...)
#define DOVETAIL_LAUNCH(kernel, grid, threads, stream, call) emulated::launch(kernel, grid, threads, call)
using std::isnan;
using std::max;
using std::min;
