"""`dovetail tune kernels` measures the requested products, resumes an interrupted run, and writes a
table that the provider reads."""

from __future__ import annotations

import json
from argparse import ArgumentParser
from dataclasses import replace

import pytest

from dovetail.errors import ConfigError, DovetailError
from dovetail.facts import device_facts
from dovetail.facts.gpus import GpuFacts
from dovetail.interfaces.matmul import WeightFormat
from dovetail.plugin.provider import Context
from dovetail_matmul_cuda import PROVIDER, TUNE, TritonOptions
from dovetail_matmul_cuda.choice import (
    KERNELS,
    Case,
    Choice,
    Table,
    bucket,
    by_rule,
    table_for,
    user_table,
)
from dovetail_matmul_cuda.matmul import TritonMatmul
from dovetail_matmul_cuda.tune import (
    candidates,
    fastest,
    parse_formats,
    parse_shapes,
    shapes_of_model,
    tune,
)

W4 = WeightFormat("uint4", 128)
CASES = [Case.of(W4, 4096, 4096, rows) for rows in (1, 16, 64)]


def silent(what, done, total):
    pass


class FakeGpu:
    """Returns times by a rule, and may be interrupted after `most` products."""

    def __init__(self, most=None):
        self.measured, self.most = [], most

    def __call__(self, cases, dtype):
        for case in cases:
            if self.most is not None and len(self.measured) == self.most:
                raise KeyboardInterrupt
            self.measured.append(case)
            tried = candidates(case, ("words", "dequantize"), 132)
            yield (
                case,
                *fastest(tried, lambda c: abs(c.block_n - 64) + abs(c.split_k - 2) + c.num_warps),
            )


def test_an_interrupted_run_is_resumed(tmp_path):
    path, told = tmp_path / "deep/t.json", []
    with pytest.raises(KeyboardInterrupt):
        tune(CASES, "bfloat16", path, {"gpu": "G"}, FakeGpu(2), silent)
    assert len(Table.read(path).choices) == 2
    gpu = FakeGpu()
    tune(CASES, "bfloat16", path, {"gpu": "G"}, gpu, lambda *told_now: told.append(told_now))
    assert gpu.measured == CASES[2:]
    assert told == [("products", 2, 3), ("products", 3, 3)]
    found = Table.read(path)
    assert [found.find(case).block_n for case in CASES] == [64, 64, 64]
    assert json.loads(path.read_text())["about"] == {"gpu": "G", "dtype": "bfloat16"}


def test_the_fastest_is_chosen_and_candidates_without_resources_are_skipped():
    few = [Choice("words", block_n=n) for n in (32, 64, 128)]

    def seconds(choice):
        if choice.block_n == 32:
            raise MemoryError("no room")
        return choice.block_n

    assert fastest(few, seconds) == (few[1], 64)
    with pytest.raises(ConfigError, match=r"no kernel could be launched.*no room"):
        fastest(few[:1], seconds)


@pytest.mark.parametrize("rows", [1, 64, 4096])
@pytest.mark.parametrize("kernels", [("words", "dequantize"), ("codes",), ("scaled_mm", "codes")])
def test_candidates_can_be_launched(rows, kernels):
    """Candidates have valid parameters, and there are few enough of them to compile."""
    case = Case.of(W4, 4096, 4096, rows)
    found = candidates(case, kernels, 132)
    assert 4 <= len(found) <= 64
    assert len(set(found)) == len(found)
    for choice in found:
        assert choice.kernel in kernels
        assert all(
            n & (n - 1) == 0
            for n in (choice.block_m, choice.block_k, choice.split_k, choice.num_warps)
        )


def test_a_table_is_found_by_the_name_of_the_gpu(tmp_path):
    environ = {"XDG_CONFIG_HOME": str(tmp_path)}
    path = user_table("NVIDIA H200", environ)
    assert path.name == "NVIDIA_H200.json"
    assert table_for("NVIDIA H200", None, environ).choices == {}
    table = Table({CASES[1]: Choice("words", split_k=7)})
    table.write(path, {})
    assert table_for("NVIDIA H200", None, environ).choices == table.choices
    assert table_for("NVIDIA L4", str(path), {}).choices == table.choices


def test_the_next_larger_number_of_rows_is_used():
    table = Table({CASES[0]: Choice("words", split_k=2), CASES[2]: Choice("words", split_k=4)})
    assert [
        table.find(replace(CASES[0], rows=bucket(n))).split_k for n in (1, 2, 33, 64, 4000)
    ] == [2, 4, 4, 4, 4]
    assert table.find(replace(CASES[0], outs=4097)) is None


MAGIC = json.dumps({"entries": [vars(CASES[0]) | vars(Choice("magic"))]})


@pytest.mark.parametrize("text", ["{", '{"entries": [{"codes": "uint4"}]}', MAGIC])
def test_invalid_tables_are_rejected(tmp_path, text):
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(ConfigError, match=r"t\.json"):
        TritonMatmul.on("cpu", str(tmp_path / "t.json"))


@pytest.mark.parametrize("rows", [1, 3, 16, 64, 500, 4096])
@pytest.mark.parametrize(("outs", "ins"), [(6144, 4096), (28672, 4096), (4096, 14336), (8, 8)])
def test_the_rule_keeps_a_gpu_busy(rows, outs, ins):
    """Without a table, few rows are split over enough programs, each with at least 512 inputs."""
    choice = by_rule(Case.of(W4, outs, ins, rows), ("words", "dequantize"), 132, 2)
    assert choice.kernel in KERNELS
    if rows <= 128:
        programs = -(-outs // choice.block_n) * -(-rows // choice.block_m) * choice.split_k
        assert programs > 66 or ins < 1024 * choice.split_k
        assert ins >= 512 * choice.split_k or choice.split_k == 1


def test_arguments_become_products(tmp_path):
    llama = {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    }
    (tmp_path / "config.json").write_text(json.dumps(llama))
    assert shapes_of_model(tmp_path) == [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]
    assert parse_shapes("4096x14336, 8x16") == [(4096, 14336), (8, 16)]
    f8 = "float8_e4m3fn"
    assert parse_formats("uint4-128,int8:int8,fp8-128:float8") == [
        W4,
        WeightFormat("int8", inputs="int8"),
        WeightFormat(f8, 128, inputs=f8),
    ]


def given(*arguments):
    parser = ArgumentParser()
    TUNE.add_arguments(parser)
    return parser.parse_args(["kernels", *arguments])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "4096"], "--shapes: '4096' is not OUTPUTSxINPUTS"),
        (["--model", "nowhere"], "--model: cannot read .* from nowhere"),
        (["--shapes", "8x8", "--formats", "uint5"], "--formats: 'uint5'"),
        (["--shapes", "8x8", "--rows", "0"], "--rows: '0'"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(DovetailError, match=message):
        TUNE.run(given(*arguments), silent)


@pytest.mark.skipif(bool(device_facts().gpus), reason="there is a GPU")
def test_without_a_gpu_it_is_an_error():
    with pytest.raises(ConfigError, match="no GPU"):
        TUNE.run(given("--shapes", "8x8"), silent)


def test_fp8_products_need_newer_gpus():
    """FP8 weights with unquantized inputs do not need newer GPUs."""
    gpu = GpuFacts("NVIDIA A100", (8, 0), 2**36, (13, 0))
    facts = replace(device_facts(), gpus=(gpu,))

    def why_not(*inputs):
        needs = {"codes": ["float8_e4m3fn"], "inputs": list(inputs)}
        return PROVIDER.why_not(Context(facts, None, "cuda:0", "bfloat16", needs))

    assert why_not() == []
    assert why_not("int8") == []
    assert [str(reason) for reason in why_not("float8_e4m3fn")] == [
        "requires sm_89 or newer, but cuda:0 (NVIDIA A100) is sm_80"
    ]


def test_the_option_names_a_table(tmp_path):
    path = tmp_path / "t.json"
    Table({CASES[0]: Choice("words", split_k=2)}).write(path, {})
    assert TritonMatmul.on("cpu", TritonOptions(table=str(path)).table).table.choices.keys() == {
        CASES[0]
    }
