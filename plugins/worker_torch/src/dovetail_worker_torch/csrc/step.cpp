// Running a compiled step, and linear layers on their own.
#include <dovetail/step.h>

#include <chrono>
#include <vector>

#include "linear.h"
#include "threads.h"

using namespace dovetail;

namespace {

struct Program {
  std::vector<dovetail_op> ops;
  std::vector<Pieces> pieces;
};

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

extern "C" {

Team* dovetail_new_team() { return new Team; }

void dovetail_stop_team(Team* team) { team->stop(); }

void dovetail_free_team(Team* team) { delete team; }

Program* dovetail_new_program(const dovetail_op* ops, int64_t count) {
  return new Program{{ops, ops + count}, std::vector<Pieces>(count)};
}

void dovetail_free_program(Program* program) { delete program; }

// `seconds`, if given, has a place for each operation, to which its time is added.
void dovetail_run_program(Program* program, const dovetail_step* step, double* seconds, Team* team) {
  for (Pieces& p : program->pieces) p.reset();
  on_threads(team, step->num_threads, [&](int thread) {
    double before = seconds ? now() : 0;
    for (size_t i = 0; i < program->ops.size(); ++i) {
      const dovetail_op& op = program->ops[i];
      program->pieces[i].work(op.pieces(op.self, step), [&](int piece) { op.piece(op.self, step, piece, thread); });
      if (seconds && thread == 0) {
        const double after = now();
        seconds[i] += after - before;
        before = after;
      }
    }
  });
}

int64_t dovetail_weight_bytes(const Linear* linear) { return weight_bytes(*linear); }

void dovetail_pack(const Linear* linear, const void* rows, int64_t stride, int64_t first, int64_t count) {
  pack(*linear, rows, stride, first, count);
}

void dovetail_unpack_rows(const Linear* linear, const int64_t* rows, int64_t count, void* out, int64_t row_bytes) {
  for (int64_t i = 0; i < count; ++i) unpack_row(*linear, rows[i], static_cast<char*>(out) + i * row_bytes);
}

void dovetail_linear(const Linear* linear, const LinearCall* call, int num_rows, int num_threads, Team* team) {
  on_threads(team, num_threads, num_pieces(*linear, num_rows, num_threads),
             [&](int piece) { do_piece(*linear, *call, num_rows, piece, num_threads); });
}

const char* dovetail_instruction_set() {
#ifdef DOVETAIL_AMX
  if (amx_allowed()) return "AMX";
#endif
#if defined(DOVETAIL_AVX512) && defined(__AVX512BF16__)
  return "AVX-512 with BF16";
#elif defined(DOVETAIL_AVX512)
  return "AVX-512";
#else
  return "AVX2";
#endif
}
}
