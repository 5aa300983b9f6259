"""Weights that are made up: a config.json is enough to measure a shape."""

from __future__ import annotations

import json

import pytest

from dovetail.assembly.compose import build_engine
from dovetail.composition.resolution import resolve
from dovetail.errors import ConfigError
from dovetail.plugin.config import EngineConfig
from dovetail.types import Request, SamplingParams
from dovetail_models_torch.tiny import TINY_CONFIGS


def engine_of(tmp_path, quantization="none", **more):
    (tmp_path / "config.json").write_text(json.dumps({**TINY_CONFIGS[0], **more}))
    config = {
        "model": str(tmp_path),
        "device": "cpu",
        "dtype": "bfloat16",
        "max_model_len": 64,
        "quantization": quantization,
        "worker": {"use": "torch", "weights": "random"},
        "kv_cache": {"memory_gb": 0.01},
    }
    return build_engine(resolve(EngineConfig.model_validate(config)), lambda *_: None)


def said(engine):
    engine.add(Request("r", [5, 6, 7], SamplingParams(max_tokens=8), 8, 0, []))
    tokens = []
    while engine.has_work:
        for output in engine.step():
            assert output.error is None
            tokens += output.token_ids
    engine.worker.close()
    return tokens


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_a_config_is_enough(tmp_path, quantization):
    first = said(engine_of(tmp_path, quantization))
    assert len(first) == 8
    assert first == said(engine_of(tmp_path, quantization))


def test_quantized_checkpoints_are_not_made_up(tmp_path):
    made = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
    with pytest.raises(ConfigError, match="random weights are for plain checkpoints"):
        engine_of(tmp_path, "auto", quantization_config=made)
