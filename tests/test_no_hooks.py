"""Hooks register; objects run: once an engine is made, no hook is called."""

from __future__ import annotations

from typing import Any

import pluggy
import pytest

from dovetail import LLM, SamplingParams
from dovetail.plugin.discovery import load_registry


@pytest.mark.parametrize("overlap", [False, True])
def test_no_hook_is_called_in_the_loop(overlap: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    call = pluggy.HookCaller.__call__

    def counted(self: Any, **kwargs: Any) -> Any:
        called.append(self.name)
        return call(self, **kwargs)

    monkeypatch.setattr(pluggy.HookCaller, "__call__", counted)
    load_registry()
    assert called, "the count works"
    with LLM("demo", dtype="float32", overlap=overlap, scheduler={"max_num_seqs": 3}) as llm:
        called.clear()
        prompts = [f"request number {i}, the first words of which are alike" for i in range(8)]
        llm.generate(
            prompts, [SamplingParams(max_tokens=6 + i, temperature=i % 2, seed=i) for i in range(8)]
        )
        assert llm.engine.snapshot().num_steps > 10
    assert called == []
