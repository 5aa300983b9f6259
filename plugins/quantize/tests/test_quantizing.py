"""Test `dovetail quantize` on tiny random models: output, report, errors and resumption."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from argparse import Namespace
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import unpacking
from safetensors import SafetensorError
from torch import Tensor

from dovetail.cli.main import main
from dovetail.errors import ConfigError
from dovetail.frontend.tokenizer import Tokenizer
from dovetail_quantize import QUANTIZE, folder, layerwise
from dovetail_quantize.command import run
from dovetail_quantize.schemes import make_scheme
from dovetail_quantize.skeleton import Skeleton
from dovetail_quantize.texts import read_texts
from dovetail_testing.plugin import make_model
from dovetail_testing.tiny_model import LAYERS

SMALL = ["--num-samples", "12", "--sample-len", "16", "--group-size", "16"]
SCHEMES: dict[str, list[str]] = {
    "fp8": [],
    "int8": [],
    "awq": ["--group-size", "16"],
    "gptq": ["--group-size", "16", "--desc-act"],
}


def quantize(model: Path, out: Path, *args: str, text: Path | None = None) -> int:
    given = ["--calibration", str(text)] if text is not None else []
    sizes = ["--num-samples", "12", "--sample-len", "16"]
    return main(["quantize", str(model), "--out", str(out), *sizes, *given, *args])


def perplexity(
    model: Path,
    weights: dict[str, Tensor],
    windows: Tensor,
    round_inputs: Callable[[Tensor], Tensor] | None,
) -> float:
    """Return the perplexity of the model with these weights, computed by transformers."""
    with torch.inference_mode():
        whole: Any = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        assert not whole.load_state_dict(weights, strict=False).unexpected_keys
        for module in whole.model.layers.modules():
            if isinstance(module, torch.nn.Linear) and round_inputs is not None:
                module.register_forward_pre_hook(lambda module, args: (round_inputs(args[0]),))
        logits = whole(windows).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten()
        )
    return math.exp(float(loss))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_checkpoint_is_what_the_report_says(
    scheme: str, model: Path, text: Path, tmp_path: Path
) -> None:
    """The reported perplexity equals that of weights read by independent code, and is close to the
    original model's."""
    out = tmp_path / "out"
    assert (
        quantize(
            model, out, "--scheme", scheme, *SCHEMES[scheme], "--evaluation", str(text), text=text
        )
        == 0
    )
    config = json.loads((out / "config.json").read_text())
    assert {k: v for k, v in config.items() if k != "quantization_config"} == json.loads(
        (model / "config.json").read_text()
    )
    weights = unpacking.read(out)
    tokens = torch.tensor(Tokenizer(model).encode(text.read_text()))
    windows = tokens[: len(tokens) // 16 * 16].view(-1, 16)
    windows = windows[
        [i * len(windows) // min(64, len(windows)) for i in range(min(64, len(windows)))]
    ]
    round_inputs = make_scheme(scheme, **OPTIONS).round_inputs
    report = json.loads((out / "quantization_report.json").read_text())
    assert math.isclose(
        report["perplexity_after"], perplexity(model, weights, windows, round_inputs), rel_tol=1e-4
    )
    assert math.isclose(
        report["perplexity_before"], perplexity(model, {}, windows, None), rel_tol=1e-4
    )
    assert abs(report["perplexity_after"] / report["perplexity_before"] - 1) < (
        0.1 if scheme in ("fp8", "int8") else 0.5
    )
    assert [row["layer"] for row in report["layers"]] == list(range(LAYERS))
    assert all(
        0 < e < 0.5 for row in report["layers"] for e in [*row["errors"].values(), row["drift"]]
    )
    assert (
        report["bytes_after"]
        == sum(f.stat().st_size for f in out.glob("*.safetensors"))
        < report["bytes_before"]
    )
    assert "<svg" in (out / "quantization_report.svg").read_text()
    assert len((out / "quantization_report.md").read_text().splitlines()) > LAYERS
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "chat_template.jinja",
    ):
        if (model / name).exists():
            assert (out / name).read_bytes() == (model / name).read_bytes()
    assert not list(out.glob(".*"))


OPTIONS: dict[str, Any] = {
    "has_text": True,
    "weight_only": False,
    "bits": 4,
    "group_size": 128,
    "nearest": False,
    "desc_act": False,
    "asymmetric": False,
    "damp": 0.01,
}


def test_calibrating_is_better_than_rounding_to_nearest(
    model: Path, text: Path, tmp_path: Path
) -> None:
    """Compares the drift on text that was not used for calibration."""
    for scheme in ("awq", "gptq"):
        errors = []
        for option in ((), ("--nearest",)):
            out = tmp_path / f"{scheme}{len(option)}"
            assert (
                quantize(model, out, "--scheme", scheme, "--group-size", "16", *option, text=text)
                == 0
            )
            report = json.loads((out / "quantization_report.json").read_text())
            errors.append(report["layers"][0]["drift"])
        assert errors[0] < errors[1], scheme


def test_no_text_is_needed_where_nothing_is_measured(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quantize(model, tmp_path / "out", "--scheme", "int8") == 0
    said = capsys.readouterr()
    assert "perplexity not measured: no text was given" in said.out
    assert "quantizing 2 layers: done" in said.err


def arguments(model: Path, out: Path, text: Path, *more: str) -> Namespace:
    from argparse import ArgumentParser

    parser = ArgumentParser()
    QUANTIZE.add_arguments(parser)
    return parser.parse_args(
        [str(model), "--out", str(out), "--calibration", str(text), *SMALL, *more]
    )


class Killed(BaseException):
    pass


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_a_killed_run_goes_on_where_it_was_and_gives_the_same_bytes(
    model: Path, text: Path, tmp_path: Path
) -> None:
    whole, out, steps = tmp_path / "whole", tmp_path / "out", list[int]()
    run(
        arguments(model, whole, text, "--scheme", "gptq"),
        lambda what, done, total: steps.append(done),
    )
    before = 0
    for last in sorted(set(steps)):
        begun = list[int]()

        def killed(
            what: str, done: int, total: int, last: int = last, begun: list[int] = begun
        ) -> None:
            begun.append(done)
            if done >= last:
                raise Killed

        with pytest.raises(Killed):
            run(arguments(model, out, text, "--scheme", "gptq"), killed)
        assert begun[0] == before // layerwise.STEPS * layerwise.STEPS, "it went on where it was"
        before = last
        assert not (out / "config.json").exists()
        (out / "model-00002-of-00003.partial.safetensors").write_bytes(
            b"what a killed process leaves"
        )
    run(arguments(model, out, text, "--scheme", "gptq"), lambda *_: None)
    assert contents(out) == contents(whole)


def test_only_one_decoder_layer_is_in_memory(model: Path, text: Path, tmp_path: Path) -> None:
    skeleton = Skeleton(model)
    scheme = make_scheme("awq", **{**OPTIONS, "group_size": 16})
    texts = read_texts(
        model, text, None, needed=True, num_samples=12, sample_len=16, num_evaluated=4
    )
    found: list[int] = []

    def count(*_: object) -> None:
        found.append(
            sum(any(not p.is_meta for p in layer.parameters()) for layer in skeleton.layers)
        )

    layerwise.quantize_model(
        skeleton, scheme, texts, folder.OutputFolder(tmp_path / "out", {}, 0), count
    )
    assert max(found) == 1
    assert all(p.is_meta for p in skeleton.model.parameters())


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (
            ["--scheme", "gtpq"],
            "--scheme 'gtpq' is unknown. Did you mean gptq? Known schemes: fp8, int8, awq, gptq",
        ),
        (["--scheme", "gptq"], "--calibration FILE is required"),
        (["--scheme", "awq", "--calibration", "EMPTY"], "EMPTY is empty"),
        (
            ["--scheme", "awq", "--calibration", "SHORT"],
            "too short: 2 windows of 16 tokens, but --num-samples is 12",
        ),
        (["--scheme", "awq", "--calibration", "BYTES"], "cannot be read as text"),
        (["--scheme", "awq", "--calibration", "no-such-file"], "cannot be read as text"),
        (
            ["--scheme", "fp8", "--evaluation", "SHORT", "--sample-len", "100"],
            "too short: less than one window of 100 tokens",
        ),
        (
            ["--scheme", "fp8", "--sample-len", "100000"],
            "--sample-len 100000: the model's context is 512 tokens",
        ),
        (
            ["--scheme", "fp8", "--num-samples", "0"],
            "--num-samples and --num-evaluated must be at least 1",
        ),
        (
            ["--scheme", "gptq", "--calibration", "TEXT"],
            "--group-size 128: the 32 inputs of model.layers.0.self_attn.q_proj",
        ),
        (
            ["--scheme", "gptq", "--calibration", "TEXT", "--group-size", "0"],
            "--group-size 0: must be at least 1, or -1",
        ),
        (["--scheme", "awq", "--calibration", "TEXT", "--bits", "8"], "--bits 8: awq supports 4"),
        (
            ["--scheme", "awq", "--calibration", "TEXT", "--desc-act"],
            "--desc-act is an option of gptq, not of awq",
        ),
        (["--scheme", "int8", "--weight-only"], "--weight-only is an option of fp8, not of int8"),
        (
            ["--scheme", "int8", "--group-size", "64"],
            "--group-size is an option of awq and gptq, not of int8",
        ),
        (
            ["--scheme", "gptq", "--desc-act", "--nearest"],
            "--desc-act sets the order of the GPTQ algorithm",
        ),
        (["--scheme", "gptq", "--damp", "2"], "--damp 2.0: must be between 0 and 1"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_written(
    args: list[str],
    said: str,
    model: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "EMPTY").write_text(" \n")
    (tmp_path / "SHORT").write_text("a" * 33)
    (tmp_path / "BYTES").write_bytes(b"\xff\xfe\xff")
    shutil.copy(text, tmp_path / "TEXT")
    named = [str(tmp_path / a) if a.isupper() else a for a in args]
    assert quantize(model, tmp_path / "out", *named) == 2
    assert said in capsys.readouterr().err.replace(f"{tmp_path}/", "")
    assert not (tmp_path / "out").exists()


def test_models_that_cannot_be_taken_are_refused(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = tmp_path / "done"
    assert quantize(model, done, "--scheme", "int8") == 0
    broken, other = tmp_path / "broken", tmp_path / "gpt2"
    shutil.copytree(model, broken)
    whole = (model / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    config = transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    transformers.GPT2LMHeadModel(config).save_pretrained(other)
    capsys.readouterr()
    for source, said in (
        (
            done,
            ("is already quantized (compressed-tensors): quantize the original checkpoint instead"),
        ),
        (broken, "truncated or not a safetensors file"),
        (
            other,
            (
                "GPT2LMHeadModel cannot be quantized layer by layer: transformer.h.0.* has no"
                " linear layers"
            ),
        ),
        (tmp_path / "nowhere", "is neither a model provided by a plugin"),
    ):
        assert quantize(source, tmp_path / "out", "--scheme", "fp8") == 2
        assert said in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_awq_refuses_layers_that_its_scales_would_change(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """OLMo 2 has norms of the usual names, after its layers instead of before."""
    # With some weights the best scales are all near 1, so that nothing changes and AWQ is accepted.
    torch.manual_seed(0)
    source = make_model(tmp_path / "olmo")
    config = transformers.Olmo2Config(
        vocab_size=261,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    transformers.Olmo2ForCausalLM(config).save_pretrained(source)
    assert (
        quantize(source, tmp_path / "awq", "--scheme", "awq", "--group-size", "16", text=text) == 2
    )
    assert (
        "norms do not precede the linear layers in the usual way: use gptq"
        in capsys.readouterr().err
    )
    assert (
        quantize(source, tmp_path / "gptq", "--scheme", "gptq", "--group-size", "16", text=text)
        == 0
    )


def test_a_folder_that_holds_something_else_is_left_alone(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "letter.txt").write_text("dear reader")
    assert quantize(model, out, "--scheme", "int8") == 2
    assert "is not empty (letter.txt, …): specify a new folder" in capsys.readouterr().err
    assert quantize(model, out / "letter.txt", "--scheme", "int8") == 2
    assert "is a file: specify a folder" in capsys.readouterr().err
    assert contents(out) == {"letter.txt": b"dear reader"}


def test_an_interrupted_run_is_finished_by_the_same_command_only(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"

    def killed(what: str, done: int, total: int) -> None:
        if done:
            raise Killed

    with pytest.raises(Killed):
        run(arguments(model, out, text, "--scheme", "gptq"), killed)
    before = contents(out)
    assert (
        quantize(model, out, "--scheme", "gptq", "--group-size", "16", "--damp", "0.02", text=text)
        == 2
    )
    assert (
        "an interrupted run with other settings (damp: was 0.01, is 0.02)"
        in capsys.readouterr().err
    )
    assert contents(out) == before
    assert quantize(model, out, "--scheme", "gptq", "--group-size", "16", text=text) == 0


def test_a_disk_that_is_too_small_is_found_before_anything_is_written(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: namedtuple("usage", "total used free")(10, 10, 1000)
    )
    assert quantize(model, tmp_path / "out", "--scheme", "fp8") == 2
    assert "the disk has 0.0 MB free, but 0.1 MB are needed" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


FULL = [
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
]


@pytest.mark.parametrize("error", FULL, ids=["python", "safetensors"])
def test_a_disk_that_fills_up_leaves_whole_files_and_the_run_can_go_on(
    error: Exception, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, save = tmp_path / "out", folder.save_file
    written: list[Path] = []

    def full(tensors: Any, path: Path, **kwargs: Any) -> None:
        save(tensors, path, **kwargs)
        written.append(path)
        if len(written) == 4:  # streams, layer, streams, layer: the second layer is half written
            path.write_bytes(path.read_bytes()[:100])
            raise error

    monkeypatch.setattr(folder, "save_file", full)
    with pytest.raises(
        ConfigError,
        match=r"the disk is full, and [\d.]+ MB are still needed. 1 layers are finished and kept",
    ):
        run(arguments(model, out, text, "--scheme", "gptq"), lambda *_: None)
    assert [p.name for p in out.glob("*.safetensors") if not p.name.startswith(".")] == [
        "model-00001-of-00003.safetensors"
    ]
    assert not list(out.glob("*partial*"))
    assert not (out / "config.json").exists()
    monkeypatch.setattr(folder, "save_file", save)
    assert run(arguments(model, out, text, "--scheme", "gptq"), lambda *_: None) == 0
    run(arguments(model, tmp_path / "whole", text, "--scheme", "gptq"), lambda *_: None)
    assert contents(out) == contents(tmp_path / "whole")
