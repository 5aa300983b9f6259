// Work that threads take piece by piece, and can wait for. Unlike a barrier, it does not wait for a thread that the system has
// not scheduled yet: the others do its share.
#pragma once

#include <immintrin.h>
#include <sched.h>

#include <atomic>

namespace dovetail {

// Waits until `done()`, which another thread is about to make true: spins, then yields the core.
template <class F>
void wait_until(F&& done) {
  constexpr int kSpins = 4000;  // about 50 µs, which is roughly the cost of yielding the core and getting it back
  for (int spins = 0; !done(); ++spins)
    if (spins < kSpins)
      _mm_pause();
    else
      sched_yield();
}

class Pieces {
 public:
  // Takes pieces of `count` until none is left, then waits until all are done. Every thread passes the same count.
  template <class F>
  void work(int count, F&& f) {
    if (count == 0) return;
    int done = 0;
    for (int i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count; ++done) f(i);
    if (done) done_.fetch_add(done, std::memory_order_release);
    wait_until([&] { return done_.load(std::memory_order_acquire) >= count; });
  }
  // Prepares the next round; no thread may be working.
  void reset() {
    next_.store(0, std::memory_order_relaxed);
    done_.store(0, std::memory_order_relaxed);
  }

 private:
  alignas(64) std::atomic<int> next_{0};
  alignas(64) std::atomic<int> done_{0};
};

}  // namespace dovetail
