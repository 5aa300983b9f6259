// Threads that run one function together, again and again: those of a step.
//
// Waking a thread takes about as long as the time between two steps of a small model, so a thread that waits for the next call
// spins before it sleeps. Where other processes want the cores too, a thread that the system stops in the middle of a call
// holds up all others, for a few milliseconds each time. So a thread that is stopped too often stays away for a while, and the
// others, with a core each, do its share.
#pragma once

#include <dovetail/pieces.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <climits>
#include <cstdint>
#include <memory>
#include <thread>
#include <type_traits>
#include <vector>

namespace dovetail {

constexpr int64_t kMillisecond = 1'000'000;  // in nanoseconds

// When a thread stays away, and for how long. Times are in nanoseconds.
class Absence {
 public:
  // Until `time` the thread wanted to run for `took`, and for `lost` of it did not. Returns how long it now stays away: not at
  // all as long as it loses less than a quarter of its time, but for a little. Longer each time if it is soon stopped again.
  int64_t after(int64_t time, int64_t took, int64_t lost) {
    debt_ = std::max<int64_t>(0, debt_ + lost - took / 4);
    if (debt_ < kPatience) return 0;
    length_ = time < back_ + kSoon ? std::min(2 * length_, kLongest) : kFirst;
    back_ = time + length_;
    debt_ = 0;
    return length_;
  }

 private:
  static constexpr int64_t kPatience = kMillisecond;  // others' short tasks take less, who wants a whole core takes more
  static constexpr int64_t kFirst = 10 * kMillisecond, kLongest = 500 * kMillisecond, kSoon = 20 * kMillisecond;
  int64_t debt_ = 0, length_ = kFirst, back_ = -kSoon;
};

class Team {
 public:
  Team() = default;
  ~Team() { stop(); }
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  // f(thread) on this thread, which is thread 0, and on up to `num_threads` - 1 others, all of them done when it returns. Which
  // of them take part is not said: one that the system has not let run meanwhile does not. So f takes its work from `Pieces`.
  // A caller who finds the team at work for another one runs f alone. f throws nothing.
  template <class F>
  void run(int num_threads, F&& f) {
    if (num_threads < 2 || busy_.exchange(true)) {
      f(0);
      return;
    }
    start(num_threads - 1);
    using Function = std::remove_reference_t<F>;
    call_ = [](const void* function, int thread) { (*static_cast<Function*>(const_cast<void*>(function)))(thread); };
    function_ = &f;
    state_.store((state_.load() + kCall) | kOpen);
    if (num_asleep_.load()) wake(state_);
    f(0);
    state_.fetch_and(~kOpen);
    wait_until([&] { return !(state_.load() & kActive); });
    busy_.store(false);
  }

  // End the threads; the next `run` starts others.
  void stop() {
    wait_until([&] { return !busy_.exchange(true); });
    end();
    busy_.store(false);
  }

 private:
  using Word = std::atomic<uint32_t>;
  static_assert(sizeof(Word) == 4 && Word::is_always_lock_free);

  static constexpr int64_t kSpin = kMillisecond;  // more than passes between two steps of a small model

  // state_: the number of the call (which comes round: whoever misses all the others misses one more), whether threads may
  // still join in, and how many have.
  static constexpr uint32_t kOpen = 1 << 11, kCall = kOpen << 1, kActive = kOpen - 1;
  static uint32_t call_of(uint32_t state) { return state & ~(kOpen | kActive); }

  static int64_t now(clockid_t clock = CLOCK_MONOTONIC) {
    timespec time;
    clock_gettime(clock, &time);
    return time.tv_sec * 1000 * kMillisecond + time.tv_nsec;
  }

  // Sleep if the word has this value, until it is woken, or for `limit` nanoseconds, or not so long.
  static void sleep(const Word& word, uint32_t value, const int64_t* limit = nullptr) {
    const timespec time{limit ? *limit / (1000 * kMillisecond) : 0, limit ? *limit % (1000 * kMillisecond) : 0};
    syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, limit ? &time : nullptr, nullptr, 0);
  }
  static void wake(const Word& word) { syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0); }

  void start(int count) {
    if (threads_ && static_cast<int>(threads_->size()) == count && process_ == getpid()) return;
    end();
    process_ = getpid();
    threads_ = std::make_unique<std::vector<std::thread>>();
    for (int thread = 1; thread <= count; ++thread) threads_->emplace_back([this, thread] { work(thread); });
  }

  void end() {
    if (!threads_) return;
    if (process_ == getpid()) {
      ending_.store(1);
      state_.fetch_add(kCall);
      wake(ending_);
      wake(state_);
      for (std::thread& thread : *threads_) thread.join();
      threads_.reset();
    } else {
      (void)threads_.release();  // of the process that this one was forked from: it has none of them
    }
    for (Word* word : {&state_, &num_asleep_, &ending_}) word->store(0);
  }

  void work(int thread) {
    pthread_setname_np(pthread_self(), "dovetail-team");
    Absence absence;
    Time since;
    for (uint32_t last = 0;;) {
      uint32_t state = wait(last, since);
      if (ending_.load()) return;
      while ((state & kOpen) && !state_.compare_exchange_weak(state, state + 1)) {
      }
      last = call_of(state);
      if (!(state & kOpen)) continue;  // too late
      call_(function_, thread);
      state_.fetch_sub(1);
      const Time time;
      const int64_t took = time.wall - since.wall, away = absence.after(time.wall, took, took - (time.cpu - since.cpu));
      since = time;
      if (!away) continue;
      for (int64_t left = away; left > 0 && !ending_.load(); left = time.wall + away - now()) sleep(ending_, 0, &left);
      since = Time();
    }
  }

  // On the clock, and of this thread's running.
  struct Time {
    int64_t wall = now(), cpu = now(CLOCK_THREAD_CPUTIME_ID);
  };

  // Until there is another call than the last; its state. `since` becomes the time at which the thread last woke up.
  uint32_t wait(uint32_t last, Time& since) {
    for (int64_t began = now();;) {
      const uint32_t state = state_.load();
      if (call_of(state) != last) return state;
      if (now() - began < kSpin) {
        _mm_pause();
        continue;
      }
      num_asleep_.fetch_add(1);
      sleep(state_, state);
      num_asleep_.fetch_sub(1);
      since = Time();
      began = since.wall;
    }
  }

  alignas(64) Word state_{0};
  alignas(64) Word num_asleep_{0};
  Word ending_{0};
  std::atomic<bool> busy_{false};
  void (*call_)(const void* function, int thread) = nullptr;
  const void* function_ = nullptr;
  std::unique_ptr<std::vector<std::thread>> threads_;
  pid_t process_ = 0;  // whose threads they are
};

}  // namespace dovetail
