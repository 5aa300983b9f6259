// The C functions of the library, and the two operations of a compiled step: prepare the rows of x, then multiply.
#include <dovetail/pieces.h>
#include <dovetail/step.h>
#include <omp.h>

#include <algorithm>

#include "matmul.h"

using namespace dovetail;

namespace {

struct Operation {
  const Weight* weight;
  Call call;
};

constexpr int64_t kGrain = 4096;  // number of elements of x per piece, at least

int prepare_pieces(const Weight& w, int num_rows, int num_threads) {
  return static_cast<int>(std::clamp<int64_t>(num_rows * w.depth / kGrain, 1, std::min<int64_t>(num_rows, 4 * num_threads)));
}

void prepare_piece(const Weight& w, const Call& call, int num_rows, int pieces, int piece) {
  const int64_t bytes = Rows(w).bytes, size = w.type == Type::f32 ? 4 : 2;
  for (int64_t t = static_cast<int64_t>(num_rows) * piece / pieces; t < static_cast<int64_t>(num_rows) * (piece + 1) / pieces; ++t)
    prepare_row(w, static_cast<const char*>(call.x) + t * call.x_stride * size, static_cast<char*>(call.rows) + t * bytes);
}

int32_t prepare_op_pieces(const void* self, const dovetail_step* step) {
  return prepare_pieces(*static_cast<const Operation*>(self)->weight, step->num_tokens, step->num_threads);
}

void prepare_op_piece(const void* self, const dovetail_step* step, int32_t piece, int32_t) {
  const auto& op = *static_cast<const Operation*>(self);
  prepare_piece(*op.weight, op.call, step->num_tokens, prepare_op_pieces(self, step), piece);
}

int32_t multiply_op_pieces(const void* self, const dovetail_step* step) {
  return num_pieces(*static_cast<const Operation*>(self)->weight, step->num_tokens, step->num_threads);
}

void multiply_op_piece(const void* self, const dovetail_step* step, int32_t piece, int32_t) {
  const auto& op = *static_cast<const Operation*>(self);
  do_piece(*op.weight, op.call, step->num_tokens, piece, step->num_threads);
}

}  // namespace

extern "C" {

int64_t dovetail_packed_bytes(const Weight* weight) { return weight->num_panels() * weight->panel_bytes(); }

int64_t dovetail_row_bytes(const Weight* weight) { return Rows(*weight).bytes; }

void dovetail_pack(const Weight* weight, const uint8_t* codes) { pack(*weight, codes); }

void dovetail_multiply(const Weight* weight, const Call* call, int num_rows, int num_threads) {
  Pieces prepare, multiply;
  const int pieces = prepare_pieces(*weight, num_rows, num_threads);
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
  {
    prepare.work(pieces, [&](int piece) { prepare_piece(*weight, *call, num_rows, pieces, piece); });
    multiply.work(num_pieces(*weight, num_rows, num_threads), [&](int piece) { do_piece(*weight, *call, num_rows, piece, num_threads); });
  }
}

void dovetail_ops(const Operation* operation, dovetail_op* ops) {
  ops[0] = {prepare_op_pieces, prepare_op_piece, operation};
  ops[1] = {multiply_op_pieces, multiply_op_piece, operation};
}
}
