// Calls of a team that check themselves. With -DMAIN a program, for tools that look for data races.
#include <dovetail/team.h>

#include <random>

using namespace dovetail;

namespace {

void spend(int64_t nanoseconds) {
  const auto until = std::chrono::steady_clock::now() + std::chrono::nanoseconds(nanoseconds);
  while (std::chrono::steady_clock::now() < until) {
  }
}

}  // namespace

extern "C" {

Team* new_team() { return new Team; }
void stop_team(Team* team) { team->stop(); }
void free_team(Team* team) { delete team; }

// Calls of two operations, the second of which needs all of the first. Returns what went wrong: pieces that were not done once,
// or not after those that they need, threads in two pieces at once or numbered too high, and threads at work after a call.
int64_t calls(Team* team, int num_threads, int num_calls, uint32_t seed) {
  std::mt19937 rng(seed);
  int64_t wrong = 0;
  for (int call = 0; call < num_calls; ++call) {
    const int count = rng() % 20, of_piece = rng() % 4 ? 0 : rng() % 20'000;
    std::vector<int> squares(count), sums(count);
    std::vector<std::atomic<int>> inside(num_threads);
    std::atomic<int> mistakes{0}, present{0};
    Pieces first, second;
    const auto enter = [&](int thread) { mistakes += thread >= num_threads || inside[thread]++ != 0; };
    team->run(num_threads, [&](int thread) {
      ++present;
      first.work(count, [&](int piece) {
        enter(thread);
        spend(of_piece);
        squares[piece] += piece * piece + call;
        --inside[thread];
      });
      second.work(count, [&](int piece) {
        enter(thread);
        for (int square : squares) sums[piece] += square;
        --inside[thread];
      });
      --present;
    });
    wrong += mistakes + present;
    int sum = 0;
    for (int piece = 0; piece < count; ++piece) sum += piece * piece + call;
    for (int found : sums) wrong += found != sum;
    // Mostly at once, or after some host time; now and then the threads have gone to sleep, or are about to.
    const uint32_t pause = rng() % 256;
    spend(pause == 0 ? 900'000 + rng() % 200'000 : pause < 32 ? rng() % 100'000 : 0);
  }
  return wrong;
}

// How long a thread stays away after each of these, in milliseconds: {its time before, what it lost of that}.
void absences(const int64_t (*spans)[2], int64_t count, int64_t* away) {
  Absence absence;
  int64_t time = 0;
  for (int64_t i = 0; i < count; ++i) {
    time += spans[i][0] * kMillisecond;
    away[i] = absence.after(time, spans[i][0] * kMillisecond, spans[i][1] * kMillisecond) / kMillisecond;
    time += away[i] * kMillisecond;
  }
}
}

#ifdef MAIN
#include <cstdio>
int main() {
  int64_t wrong = 0;
  for (int round = 0; round < 20; ++round)
    for (int threads = 1; threads <= 4; ++threads) {
      Team mine, shared;
      std::vector<std::thread> callers;
      std::atomic<int64_t> theirs{0};
      for (int i = 0; i < 2; ++i)
        callers.emplace_back([&, i] {
          Team own;
          theirs += calls(&own, threads, 200, std::random_device()());
          theirs += calls(&shared, threads, 200, std::random_device()());
          if (i) own.stop();
        });
      wrong += calls(&mine, threads, 200, std::random_device()());
      mine.stop();
      wrong += calls(&mine, threads % 4 + 1, 200, std::random_device()());
      for (std::thread& caller : callers) caller.join();
      wrong += theirs;
    }
  std::printf("%ld wrong\n", static_cast<long>(wrong));
  return wrong != 0;
}
#endif
