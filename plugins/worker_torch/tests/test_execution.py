"""How a forward pass will run: decided from facts, with a reason, before anything is loaded."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from dovetail.errors import ConfigError
from dovetail.facts import DeviceFacts
from dovetail.provider import Context
from dovetail_worker_torch.decoder import ARCHITECTURES
from dovetail_worker_torch.execution import OWN_ARCHITECTURES, settle

AVX512 = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16"})
DEVICE = DeviceFacts("Linux", "x86_64", 4, 2**33, AVX512, 0, "/usr/bin/c++")


def context(architecture: str = "LlamaForCausalLM", dtype: str = "bfloat16", name: str = "cpu", **device: Any) -> Context:
    model: Any = SimpleNamespace(architecture=architecture)
    return Context(replace(DEVICE, **device), model, name, dtype, {"compiled_attention": True})


def test_auto_compiles_where_it_can() -> None:
    execution, remarks = settle(context(), "auto")
    assert execution == "compiled"
    assert "AVX-512 with BF16" in remarks[0]
    assert "AMX" in settle(context(cpu_flags=AVX512 | {"amx_bf16", "amx_tile"}), "auto")[1][0]
    assert "float32" in settle(context(dtype="float32"), "auto")[1][0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "cuda:0"}, "the device is cuda:0"),
        ({"machine": "aarch64"}, "Linux on aarch64"),
        ({"cpu_flags": AVX512 - {"avx512bw"}}, "no avx512bw"),
        ({"compiler": None}, "no C++ compiler"),
        ({"dtype": "float16"}, "not float16"),
    ],
)
def test_why_not(changes: dict[str, Any], words: str) -> None:
    execution, (remark,) = settle(context(**changes), "auto")
    assert execution == "plain"
    assert words in remark
    with pytest.raises(ConfigError, match=r"worker\.execution: compiled cannot be had here: .*Set it to auto or plain"):
        settle(context(**changes), "compiled")
    assert settle(context(**changes), "plain") == ("plain", [])


def test_attention_must_take_part() -> None:
    alone = replace(context(), needs={"compiled_attention": False})
    assert "attention" in settle(alone, "auto")[1][0]


def test_models_of_the_bridge_are_compiled_by_torch_when_asked() -> None:
    assert settle(context("GPT2LMHeadModel"), "auto")[0] == "plain"
    execution, remarks = settle(context("GPT2LMHeadModel"), "compiled")
    assert execution == "compiled"
    assert "torch.compile" in remarks[0]
    with pytest.raises(ConfigError, match=r"no C\+\+ compiler"):
        settle(context("GPT2LMHeadModel", compiler=None), "compiled")
    assert settle(context("GPT2LMHeadModel", name="cuda:0", compiler=None), "compiled")[0] == "compiled"


def test_the_names_are_those_of_the_decoder() -> None:
    assert set(OWN_ARCHITECTURES) == set(ARCHITECTURES)
