"""`dovetail explain` says for each linear layer its scheme, what multiplies by it, and its bytes:
before a weight is read."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from awq_gptq_packers import make_gptq
from quantized import SIZES, quantize

from dovetail import LLM
from dovetail.assembly.compose import weights_of
from dovetail.cli.main import main
from dovetail.composition.resolution import resolve
from dovetail.errors import CheckpointError
from dovetail.plugin.config import load_config
from dovetail.runtime.serving import AsyncEngine
from dovetail_server_openai import ServerOptions
from dovetail_server_openai.app import make_app

CHECKPOINTS = Path(__file__).parent / "checkpoints"
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": False, "desc_act": False}


def explained(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    capsys.readouterr()
    assert main(["explain", "--device", "cpu", *args]) == 0
    return capsys.readouterr().out


def test_layers_that_are_alike_have_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    out = explained(capsys, "--model", str(CHECKPOINTS / "gptq_w4_g128_sym"))
    lines = [line.split() for line in out[out.index("weights of linear layers") :].splitlines()[2:]]
    names = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    assert [line[0] for line in lines] == [
        *(f"model.layers.{{0..1}}.{name}" for name in names),
        "lm_head",
    ]
    assert re.search(r"512 × 256 +gptq +uint4, groups of 128, zeros +matmul: ", out)
    assert "not quantized in the checkpoint" in out
    assert "weights of linear layers" not in explained(capsys)


def test_for_machines(capsys: pytest.CaptureFixture[str]) -> None:
    data = json.loads(explained(capsys, "--model", str(CHECKPOINTS / "ct_int8_w8a8_rtn"), "--json"))
    matmul = data["choices"]["matmul"]["provider"]
    first, *_, head = data["weights"]
    assert len(data["weights"]) == 2 * 4 + 1
    assert {
        key: first[key]
        for key in ("name", "in_features", "out_features", "key", "scheme", "gemm_backend")
    } == {
        "name": "model.layers.0.self_attn.qkv_proj",
        "in_features": 256,
        "out_features": 512,
        "key": "quantization",
        "scheme": "compressed-tensors",
        "gemm_backend": f"matmul: {matmul}",
    }
    assert (head["name"], head["scheme"], head["form"]) == ("lm_head", "none", "bfloat16")
    assert head["remark"] == "not quantized in the checkpoint (ignore)"


@pytest.mark.parametrize("matmul", ["torch", "auto"])
@pytest.mark.parametrize("name", ["gptq_w4_g128_sym", "ct_fp8_dynamic"])
def test_before_and_after_the_weights_are_read(name: str, matmul: str) -> None:
    values: dict[str, Any] = {"model": str(CHECKPOINTS / name), "device": "cpu", "matmul": matmul}
    said = weights_of(resolve(load_config(**values)))
    with LLM(**values) as llm:
        engine: Any = llm.engine
        assert engine.worker.weights() == said
        assert said[0].gemm_backend == f"matmul: {llm.plan.choices['matmul'].provider}"


def test_a_server_says_it_with_its_plan() -> None:
    async def ask(name: str) -> dict[str, Any]:
        engine = AsyncEngine(load_config(model=name, device="cpu"), server=True)
        try:
            await engine.start()
            async with asyncio.timeout(30):
                while not engine.invoked:  # noqa: ASYNC110 - what is waited for has no event
                    await asyncio.sleep(0.01)
            transport = httpx.ASGITransport(make_app(engine, ServerOptions()))
            async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
                answer: dict[str, Any] = (await client.get("/v1/dovetail/plan")).json()
                return answer
        finally:
            await engine.close()

    said = asyncio.run(ask(str(CHECKPOINTS / "awq_w4_g128_gemm")))
    assert [(group["names"], group["count"], group["one"]["scheme"]) for group in said["weights"]][
        -2:
    ] == [
        ("model.layers.{0..1}.mlp.down_proj", 2, "awq"),
        ("lm_head", 1, "none"),
    ]
    assert said["attested"]["quantization"]["invoked"]
    assert "weights" not in asyncio.run(ask("demo"))


def test_bytes_by_hand() -> None:
    """Of the reference: codes, and a scale and a zero point for each group."""
    said = weights_of(
        resolve(
            load_config(model=str(CHECKPOINTS / "gptq_w4_g128_sym"), device="cpu", matmul="torch")
        )
    )
    assert {layer.name: layer.nbytes for layer in said}[
        "model.layers.1.mlp.down_proj"
    ] == 256 * 512 // 2 + 256 * 4 * (4 + 1)


def test_a_checkpoint_that_does_not_fit_is_an_error_before_it_is_read(tmp_path: Path) -> None:
    made = quantize(
        tmp_path,
        GPTQ,
        [("lm_head", None), ("*.o_proj", None), ("*", lambda weight: make_gptq(GPTQ, weight))],
    )
    assert len(made.tensors) > SIZES["num_hidden_layers"]
    with pytest.raises(
        CheckpointError,
        match=r"self_attn\.o_proj is stored as a plain weight, and quantization_config",
    ):
        weights_of(resolve(load_config(model=str(tmp_path), device="cpu")))
