// What runs on threads: on a team, or where there is none on PyTorch's.
#pragma once

#include <dovetail/pieces.h>
#include <dovetail/team.h>
#include <omp.h>

namespace dovetail {

// f(thread) on up to `num_threads` threads; which of them are there is not said, so f works on `Pieces`.
template <class F>
void on_threads(Team* team, int num_threads, F&& f) {
  if (team) {
    team->run(num_threads, f);
    return;
  }
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
  f(omp_get_thread_num());
}

// f(piece) for each piece.
template <class F>
void on_threads(Team* team, int num_threads, int count, F&& f) {
  Pieces pieces;
  on_threads(team, num_threads, [&](int) { pieces.work(count, f); });
}

}  // namespace dovetail
