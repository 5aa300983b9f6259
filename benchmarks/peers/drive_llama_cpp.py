"""llama.cpp through llama-cpp-python's bindings of its C interface: see protocol.py.

A batch is several sequences of one context. The server is llama.cpp's own, a program that stands
beside this python.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import llama_cpp as c
import numpy as np
from protocol import main

BATCH = 2048
"""Tokens in one call of llama_decode."""
CONTEXT = 256
"""Tokens of a sequence."""

Token = tuple[int, int, int, bool]
"""(id, position, sequence, whether the one after it is wanted)"""


class LlamaCpp:
    version = c.__version__

    def __init__(self, model: str, threads: int) -> None:
        c.llama_backend_init()
        self._threads = threads
        self._model = c.llama_model_load_from_file(model.encode(), c.llama_model_default_params())
        if not self._model:
            sys.exit(f"llama.cpp cannot load {model}")
        self._vocab_size = c.llama_vocab_n_tokens(c.llama_model_get_vocab(self._model))
        self._contexts: dict[int, Any] = {}
        self._batch = c.llama_batch_init(BATCH, 0, 1)

    def generate(self, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
        context = self._context(len(prompts))
        c.llama_memory_clear(c.llama_get_memory(context), True)
        rows = [
            (token, i, seq, i == len(prompt) - 1)
            for seq, prompt in enumerate(prompts)
            for i, token in enumerate(prompt)
        ]
        out: list[list[int]] = [[] for _ in prompts]
        for _ in range(num_tokens):
            sampled = [
                t
                for first in range(0, len(rows), BATCH)
                for t in self._decode(context, rows[first : first + BATCH])
            ]
            rows = []
            for seq, token in enumerate(sampled):
                rows.append((token, len(prompts[seq]) + len(out[seq]), seq, True))
                out[seq].append(token)
        return out

    def _decode(self, context: Any, rows: list[Token]) -> list[int]:
        """Run tokens through the model; the likeliest next one of each row that asks for it."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for i, (token, position, seq, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = (
                token,
                position,
                1,
                wanted,
            )
            batch.seq_id[i][0] = seq
        status = c.llama_decode(context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")
        wanted_rows = sum(r[3] for r in rows)
        if not wanted_rows:
            return []
        logits = np.ctypeslib.as_array(
            c.llama_get_logits(context), shape=(wanted_rows, self._vocab_size)
        )
        tokens: list[int] = logits.argmax(axis=1).tolist()
        return tokens

    def _context(self, num_seqs: int) -> Any:
        if num_seqs not in self._contexts:
            params = c.llama_context_default_params()
            params.n_ctx, params.n_seq_max = CONTEXT * num_seqs, num_seqs
            params.n_batch, params.n_ubatch = BATCH, 512
            params.n_threads = params.n_threads_batch = self._threads
            self._contexts[num_seqs] = c.llama_init_from_model(self._model, params)
        return self._contexts[num_seqs]


def server(model: str, threads: int, port: int) -> list[str]:
    count = str(threads)
    return [
        str(Path(sys.executable).parent / "llama-server"),
        "-m",
        model,
        "-t",
        count,
        "-tb",
        count,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "-np",
        "16",
        "-c",
        str(16 * CONTEXT),
        "-b",
        str(BATCH),
        "-ub",
        "512",
    ]


if __name__ == "__main__":
    main(LlamaCpp, server)
