"""What `dovetail quantize` writes is read by others: transformers with compressed-tensors, and an
engine. (By gptqmodel, and by transformers with it: `make interop`.)"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
import unpacking
from checkpoints import SIZES
from safetensors import safe_open

from dovetail import LLM, SamplingParams
from dovetail.cli.main import main
from dovetail_testing.plugin import make_model

SCHEMES = {
    "fp8": (),
    "fp8 weight-only": ("--weight-only",),
    "int8": (),
    "awq": ("--group-size", "32"),
    "gptq": ("--group-size", "32", "--desc-act"),
    "gptq asymmetric": ("--group-size", "32", "--asymmetric"),
}
CHECKPOINTS = Path(__file__).parent / "checkpoints"
PROMPT = [5, 17, 99, 42, 7, 150, 31]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Quantize a small model that transformers made."""
    source = make_model(tmp_path_factory.mktemp("model"))
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, "vocab_size": 261}))
    for parameter in model.parameters():  # spread the logits: freshly made ones are nearly equal
        parameter.data *= 4 if parameter.dim() > 1 else 1
    model.save_pretrained(source)
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text("a few words, over and over " * 40)
    folder = tmp_path_factory.mktemp("made")

    def make(scheme: str) -> Path:
        out = folder / scheme
        if not out.exists():
            arguments = [
                "--calibration",
                str(text),
                "--num-samples",
                "8",
                "--sample-len",
                "32",
                *SCHEMES[scheme],
            ]
            assert (
                main(
                    [
                        "quantize",
                        str(source),
                        "--scheme",
                        scheme.split()[0],
                        "--out",
                        str(out),
                        *arguments,
                    ]
                )
                == 0
            )
        return out

    return make


@pytest.mark.parametrize("scheme", ["fp8", "fp8 weight-only", "int8"])
def test_transformers_loads_it_with_compressed_tensors(
    scheme: str, made: Callable[[str], Path]
) -> None:
    """Its own integration: the weights that it gives are those that an independent program reads,
    and its logits those of a model with these weights whose inputs are rounded."""
    folder = made(scheme)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load = transformers.AutoModelForCausalLM.from_pretrained
        found = load(folder, dtype=torch.float32)
        expanded = load(
            folder,
            dtype=torch.float32,
            quantization_config=transformers.CompressedTensorsConfig(dequantize=True),
        )
    plain = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.from_pretrained(folder), dtype=torch.float32
    )
    weights = unpacking.read(folder)
    assert not plain.load_state_dict(weights, strict=False).unexpected_keys
    state = expanded.state_dict()
    for name, weight in weights.items():
        torch.testing.assert_close(state[name], weight, rtol=1e-6, atol=0)
    tokens = torch.randint(
        3, 200, (16, 64)
    )  # many: of a few, chance decides how many best ones differ
    with torch.inference_mode():
        theirs, ours = (m.eval()(tokens).logits for m in (found, plain))
    assert (theirs - ours).norm() < (
        1e-5 if "only" in scheme else 0.1
    ) * ours.norm()  # they round the inputs
    assert theirs.argmax(-1).eq(ours.argmax(-1)).float().mean() > 0.7


@pytest.mark.parametrize(
    ("name", "scheme", "left_to_defaults"),
    [
        ("gptq_w4_g128_sym", "gptq", {"format", "method"}),
        ("awq_w4_g128_gemm", "awq", {"format", "method", "desc_act"}),
    ],
)
def test_files_are_like_those_of_gptqmodel(
    name: str, scheme: str, left_to_defaults: set[str], tmp_path: Path
) -> None:
    """A model of the sizes of the one that gptqmodel quantized becomes tensors of the same names,
    types and shapes, under the same words. That gptqmodel loads them is for `make interop`."""
    theirs, source = CHECKPOINTS / name, make_model(tmp_path / "model")
    config = json.loads((theirs / "config.json").read_text())
    their_config = config.pop("quantization_config")
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**config), dtype=torch.bfloat16
    )
    model.save_pretrained(source)
    text = tmp_path / "text.txt"
    text.write_text("a few words, over and over " * 40)
    arguments = ["--calibration", str(text), "--num-samples", "8", "--sample-len", "32"]
    assert (
        main(
            [
                "quantize",
                str(source),
                "--scheme",
                scheme,
                "--out",
                str(tmp_path / "out"),
                *arguments,
            ]
        )
        == 0
    )
    our_config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert our_config.pop("meta").keys() <= their_config.pop("meta").keys()
    assert our_config.items() <= their_config.items()
    assert their_config.keys() - our_config.keys() == left_to_defaults
    ours = {
        key: kind
        for file in (tmp_path / "out").glob("*.safetensors")
        for key, kind in kinds(file).items()
    }
    wanted = kinds(theirs / "model.safetensors")
    if scheme == "awq":  # AutoAWQ's type; gptqmodel takes both, and writes the model's own
        wanted = {
            key: ("F16", shape) if key.endswith(".scales") else (dtype, shape)
            for key, (dtype, shape) in wanted.items()
        }
    assert ours == wanted


def kinds(file: Path) -> dict[str, tuple[str, list[int]]]:
    """Types and shapes of a file's tensors."""
    with safe_open(file, framework="pt") as opened:
        parts = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118 (it is no mapping)
        return {key: (part.get_dtype(), part.get_shape()) for key, part in parts.items()}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_engine_reads_it(scheme: str, made: Callable[[str], Path]) -> None:
    folder = made(scheme)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    plain = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**config), dtype=torch.float32
    )
    plain.load_state_dict(unpacking.read(folder), strict=False)
    with torch.inference_mode():
        expected = plain.eval()(torch.tensor([PROMPT])).logits[0].log_softmax(-1)
    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    with LLM(folder, dtype="float32", device="cpu") as llm:
        (out,) = llm.generate(PROMPT, params)
    assert out.prompt_logprobs is not None
    for i, position in enumerate(out.prompt_logprobs[1:]):
        assert position is not None
        found = position[PROMPT[i + 1]]
        tolerance = 0.6 if scheme in ("fp8", "int8") else 0.05  # inputs are rounded there
        assert abs(found - float(expected[i, PROMPT[i + 1]])) < tolerance
