// Linear layers and embeddings as operations of a compiled step. Each struct is an operation's `self`, filled in by native.py.
#include <dovetail/op.h>

#include "linear.h"

namespace dovetail {
namespace {

struct LinearOp {
  const Linear* linear;
  LinearCall call;
};

// hidden[t] = the row of token t.
struct EmbedOp {
  const Linear* embedding;
  void* hidden;
  int64_t stride;  // of hidden, in elements
};

int32_t pieces(const LinearOp& op, const dovetail_step* step) { return num_pieces(*op.linear, step->num_tokens, step->num_threads); }

void piece(const LinearOp& op, const dovetail_step* step, int32_t i) {
  do_piece(*op.linear, op.call, step->num_tokens, i, step->num_threads);
}

int32_t pieces(const EmbedOp& op, const dovetail_step* step) {
  return split(step->num_tokens * op.embedding->depth, step->num_tokens, step->num_threads);
}

void piece(const EmbedOp& op, const dovetail_step* step, int32_t i) {
  const Share share(step->num_tokens, pieces(op, step), i);
  with_type(op.embedding->type, [&](auto e) {
    for (int64_t t = share.begin; t < share.end; ++t)
      unpack_row(*op.embedding, step->token_ids[t], static_cast<typename decltype(e)::store_t*>(op.hidden) + t * op.stride);
  });
}

}  // namespace

extern "C" {
void dovetail_linear_op(dovetail_op* op, const LinearOp* self) { describe<LinearOp>(op, self); }
void dovetail_embed_op(dovetail_op* op, const EmbedOp* self) { describe<EmbedOp>(op, self); }
}

}  // namespace dovetail
