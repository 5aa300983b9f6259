"""OpenVINO GenAI: see protocol.py. One request goes to its LLMPipeline, several to its continuous
batching."""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino
import openvino_genai as genai
from protocol import main


class OpenVINO:
    version = genai.__version__

    def __init__(self, model: str, threads: int) -> None:
        self._model = model
        self._properties = {"INFERENCE_NUM_THREADS": threads}
        self._single = genai.LLMPipeline(model, "CPU", **self._properties)
        self._batched: Any = None

    def generate(self, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
        config = genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = num_tokens
        config.ignore_eos, config.do_sample = True, False
        inputs = [openvino.Tensor(np.array([p], dtype=np.int64)) for p in prompts]
        if len(prompts) == 1:
            return [list(self._single.generate(inputs[0], config).tokens[0])]
        if self._batched is None:
            self._batched = self._continuous_batching()
        results = self._batched.generate(inputs, [config] * len(prompts))
        return [list(r.m_generation_ids[0]) for r in results]

    def _continuous_batching(self) -> Any:
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size = 2  # GB
        scheduler.max_num_batched_tokens, scheduler.max_num_seqs = 2048, 64
        scheduler.enable_prefix_caching, scheduler.dynamic_split_fuse = False, True
        return genai.ContinuousBatchingPipeline(self._model, scheduler, "CPU", self._properties)


if __name__ == "__main__":
    main(OpenVINO)
