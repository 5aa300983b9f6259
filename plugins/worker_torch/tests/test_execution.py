"""How a forward pass will run: decided from facts, with a reason, before anything is loaded."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from dovetail.assembly.builtins import PLAIN_WEIGHTS
from dovetail.errors import ConfigError
from dovetail.facts import DeviceFacts
from dovetail.interfaces.architecture import ArchitectureCapabilities
from dovetail.interfaces.quantization import QuantizationCapabilities
from dovetail.plugin.provider import Context
from dovetail_models_torch import ARCHITECTURES as OWN_ARCHITECTURES
from dovetail_models_torch import CAPABILITIES as DECODER
from dovetail_models_torch.config import ARCHITECTURES
from dovetail_models_transformers import CAPABILITIES as BRIDGE
from dovetail_worker_torch import (
    WorkerOptions,
    dovetail_workers,
)
from dovetail_worker_torch.execution import resolve_options

AVX512 = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16"})
DEVICE = DeviceFacts("Linux", "x86_64", 4, 2**33, AVX512, "/usr/bin/c++")
STRANGER = ArchitectureCapabilities(("StrangeForCausalLM",))


def context(
    dtype: str = "bfloat16", name: str = "cpu", made: Any = DECODER, **device: Any
) -> Context:
    model: Any = SimpleNamespace(architecture="SomeForCausalLM")
    needs = {"compiled_attention": True, "architecture": made, "quantization": [PLAIN_WEIGHTS]}
    return Context(replace(DEVICE, **device), model, name, dtype, needs)


def settled(context: Context, **options: Any) -> tuple[str, str, str]:
    """Execution, linear layers, remarks."""
    chosen, remarks = resolve_options(context, WorkerOptions(**options))
    return chosen.execution, chosen.linear, " | ".join(remarks)


def test_auto_compiles_where_it_can() -> None:
    execution, linear, remarks = settled(context())
    assert (execution, linear) == ("compiled", "packed")
    assert "AVX-512 with BF16" in remarks
    assert "AMX" in settled(context(cpu_flags=AVX512 | {"amx_bf16", "amx_tile"}))[2]
    assert "float32" in settled(context(dtype="float32"))[2]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"machine": "aarch64"}, "Linux on aarch64"),
        ({"cpu_flags": AVX512 - {"avx512bw"}}, "no avx512bw"),
        ({"compiler": None}, "no C++ compiler"),
        ({"dtype": "float16"}, "not float16"),
    ],
)
def test_why_not(changes: dict[str, Any], words: str) -> None:
    execution, linear, remarks = settled(context(**changes))
    assert (execution, linear) == ("plain", "torch")
    assert words in remarks
    with pytest.raises(
        ConfigError,
        match=r"worker\.execution: compiled cannot be had here: .*Set it to auto or plain",
    ):
        settled(context(**changes), execution="compiled")
    with pytest.raises(
        ConfigError, match=r"worker\.linear: packed cannot be had here: .*Set it to auto or torch"
    ):
        settled(context(**changes), linear="packed")
    assert settled(context(**changes), execution="plain") == ("plain", "torch", "")


def on_gpu(**needs: Any) -> Context:
    gpu = context(name="cuda:0", compiler=None)
    return replace(gpu, needs={**gpu.needs, "graph_capture": True, **needs})


def test_on_a_gpu_decode_steps_are_graphs() -> None:
    assert settled(on_gpu())[:2] == settled(on_gpu(), execution="graphs")[:2] == ("graphs", "torch")
    assert "CUDA graphs" in settled(on_gpu())[2]
    assert settled(on_gpu(architecture=BRIDGE))[0] == "graphs"
    assert settled(on_gpu(), execution="plain") == ("plain", "torch", "")


@pytest.mark.parametrize(
    ("needs", "words"),
    [
        ({"graph_capture": False}, "does not declare graph_capture"),
        ({"shadow": True}, "a shadow run compares layers"),
    ],
)
def test_what_is_not_captured(needs: dict[str, Any], words: str) -> None:
    execution, _, remarks = settled(on_gpu(**needs))
    assert execution == "plain"
    assert words in remarks
    with pytest.raises(ConfigError, match=r"execution: graphs cannot be had here: .*" + words):
        settled(on_gpu(**needs), execution="graphs")


def test_what_is_for_the_other_device() -> None:
    with pytest.raises(
        ConfigError, match="graphs cannot be had here: graphs are CUDA's, and the device is cpu"
    ):
        settled(context(), execution="graphs")
    with pytest.raises(ConfigError, match="compiled steps are for CPUs"):
        settled(on_gpu(), execution="compiled")
    with pytest.raises(ConfigError, match="the device is cuda:0"):
        settled(on_gpu(), linear="packed")


@pytest.mark.parametrize(
    ("needs", "words"),
    [
        ({"compiled_attention": False}, "attention"),
        ({"quantization": [PLAIN_WEIGHTS, QuantizationCapabilities()]}, "quantization"),
    ],
)
def test_what_is_chosen_must_take_part(needs: dict[str, Any], words: str) -> None:
    alone = replace(context(), needs={**context().needs, **needs})
    execution, linear, remarks = settled(alone)
    assert (execution, linear) == ("plain", "packed")
    assert f"the {words} chosen cannot be part of a compiled step" in remarks
    with pytest.raises(ConfigError, match=words):
        settled(alone, execution="compiled")


def test_a_scheme_that_can_take_part_does() -> None:
    scheme = QuantizationCapabilities(compiled_steps=True)
    assert (
        settled(replace(context(), needs={**context().needs, "quantization": [scheme]}))[0]
        == "compiled"
    )


def test_plain_is_torch_throughout_unless_packed_layers_are_asked_for() -> None:
    assert settled(context(), execution="plain") == ("plain", "torch", "")
    assert settled(context(), execution="plain", linear="packed")[:2] == ("plain", "packed")
    execution, linear, remarks = settled(context(), linear="torch")
    assert (execution, linear) == ("plain", "torch")
    assert "worker.linear is torch" in remarks


def test_a_third_party_packages_model_has_packed_layers() -> None:
    execution, linear, remarks = settled(context(made=STRANGER))
    assert (execution, linear) == ("plain", "packed")
    assert "the code of SomeForCausalLM does not offer it" in remarks
    with pytest.raises(ConfigError, match="does not offer it"):
        settled(context(made=STRANGER), execution="compiled")


def test_models_of_the_bridge_are_compiled_by_torch_when_asked() -> None:
    assert settled(context(made=BRIDGE))[:2] == ("plain", "torch")
    execution, _, remarks = settled(context(made=BRIDGE), execution="compiled")
    assert execution == "compiled"
    assert "torch.compile" in remarks
    with pytest.raises(ConfigError, match=r"no C\+\+ compiler"):
        settled(context(made=BRIDGE, compiler=None), execution="compiled")
    assert (
        settled(context(made=BRIDGE, name="cuda:0", compiler=None), execution="compiled")[0]
        == "compiled"
    )


def test_the_worker_takes_parts_written_for_torch_only() -> None:
    (worker,) = dovetail_workers()
    assert worker.why_not(context()) == []
    (reason,) = worker.why_not(context(made=replace(STRANGER, framework="jax")))
    assert "jax" in str(reason)
    (reason,) = worker.why_not(context(made=None))
    assert "architecture" in str(reason)


def test_the_names_are_those_of_the_decoder() -> None:
    assert set(OWN_ARCHITECTURES) == set(ARCHITECTURES)
