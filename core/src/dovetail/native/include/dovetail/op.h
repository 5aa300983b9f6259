// Helpers for operations of compiled steps (step.h): how a step's rows are split into pieces, and `dovetail_op` of a C++ type.
#pragma once

#include <dovetail/step.h>

#include <algorithm>

namespace dovetail {

constexpr int64_t kGrain = 4096;  // elements that are worth a piece

// Pieces for `units` that hold `elements` in all.
inline int split(int64_t elements, int64_t units, int num_threads) {
  return static_cast<int>(std::clamp<int64_t>(elements / kGrain, 1, std::min<int64_t>(units, 4 * num_threads)));
}

// The units [begin, end) of a piece.
struct Share {
  int64_t begin, end;
  Share(int64_t units, int pieces, int piece) : begin(units * piece / pieces), end(units * (piece + 1) / pieces) {}
};

// `pieces(op, step)` and `piece(op, step, i)` are found by the type of `op`.
template <class Op>
void describe(dovetail_op* op, const void* self) {
  *op = {[](const void* self, const dovetail_step* step) { return pieces(*static_cast<const Op*>(self), step); },
         [](const void* self, const dovetail_step* step, int32_t i, int32_t) { piece(*static_cast<const Op*>(self), step, i); },
         self};
}

}  // namespace dovetail
