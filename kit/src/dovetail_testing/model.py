"""The contract of the model extension point, as tests. A plugin's test is a subclass:

    class TestMyModel(ModelContract):
        provider = PROVIDER

What it asks is said by the docstrings of its checks.
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

from dovetail.facts import ModelFacts, model_facts
from dovetail.frontend.tokenizer import Tokenizer
from dovetail.interfaces.model import ModelSource
from dovetail_testing.contract import Contract, common_causes

BITS = {
    "F64": 64,
    "F32": 32,
    "F16": 16,
    "BF16": 16,
    "I64": 64,
    "I32": 32,
    "I16": 16,
    "I8": 8,
    "U8": 8,
    "BOOL": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "U64": 64,
    "U32": 32,
    "U16": 16,
    "F8_E8M0": 8,
    "F4": 4,
}
UNSAFE = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
TEXTS = ("", "Hello, world!", "def f(x):\n    return x ** 2\n", "naïve — 漢字 🙂", "a" * 300)


class ModelContract(Contract):
    """Subclass, set `provider`, and pytest does the rest."""

    extension_point = "model"

    @property
    def source(self) -> ModelSource:
        """Built as the core builds it: before there is a plan, so without a context."""
        source = self.provider.build(None, self.provider.options.model_validate(self.options))  # type: ignore[arg-type]
        assert isinstance(source, ModelSource), (
            f"build returned a {type(source).__name__}, not a ModelSource"
        )
        return source

    @property
    def facts(self) -> ModelFacts:
        return model_facts(self.source.folder)

    @common_causes(
        "a relative path",
        "package data left out of the wheel",
        "the licence of the weights not stated",
    )
    def test_declaration(self) -> None:
        """`build` leads to a folder that exists, the same one each time, and says under what
        licence the model is."""
        source = self.source
        assert source.folder.is_absolute(), (
            f"{source.folder} is relative: it depends on where the program was started"
        )
        assert source.folder.is_dir(), f"{source.folder} is no folder"
        assert source == self.source, f"built twice, it gave {source} and {self.source}"
        assert source.licence.strip(), "the licence is empty"

    @common_causes("a key that transformers fills in by default, and config.json leaves out")
    def test_the_config_says_what_is_asked(self) -> None:
        """config.json has what choosing providers needs: architecture, sizes, context, layer kinds,
        and how it ends."""
        facts = self.facts
        assert facts.architecture, "config.json names no architecture"
        assert facts.num_heads % facts.num_kv_heads == 0, (
            f"{facts.num_heads} heads do not share {facts.num_kv_heads} KV heads"
        )
        assert facts.layer_kinds, "the model has no layer"
        assert facts.eos_token_ids, (
            "no end-of-sequence token: nothing that it says would end by itself"
        )
        ends, size = facts.eos_token_ids, facts.vocab_size
        assert all(0 <= t < size for t in ends), (
            f"it ends with one of the tokens {ends}, and has {size}"
        )

    @common_causes(
        "a file cut short on its way into the package",
        "an index that names files which are not there",
    )
    def test_the_weights_are_whole(self) -> None:
        """Weights are safetensors whose headers fit their files, each tensor in one; nothing in the
        folder is pickled."""
        folder = self.source.folder
        unsafe = sorted(p.name for p in folder.iterdir() if p.suffix in UNSAFE)
        assert not unsafe, (
            f"{unsafe} are read by unpickling, which runs code: convert them to safetensors"
        )
        files = sorted(folder.glob("*.safetensors"))
        assert files, f"no *.safetensors in {folder}"
        where: dict[str, str] = {}
        for file in files:
            for name in tensors_of(file):
                assert name not in where, f"tensor {name} is in {where[name]} and in {file.name}"
                where[name] = file.name
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            told = json.loads(index.read_text())["weight_map"]
            wrong = {
                name: (file, where.get(name))
                for name, file in told.items()
                if where.get(name) != file
            }
            assert not wrong, f"the index is wrong about tensors (said, found): {wrong}"

    @common_causes(
        "a normalizer that changes what is typed", "a decoder that is missing from tokenizer.json"
    )
    def test_the_tokenizer_keeps_texts(self) -> None:
        """Every text comes back from its tokens, and all tokens are the model's."""
        facts, tokenizer = self.facts, Tokenizer(self.source.folder)
        assert tokenizer.vocab_size <= facts.vocab_size, (
            f"{tokenizer.vocab_size} tokens, and the model has {facts.vocab_size}"
        )
        for text in TEXTS:
            ids = tokenizer.encode(text, add_special_tokens=False)
            assert all(0 <= t < facts.vocab_size for t in ids), (
                f"{text!r} has tokens {ids}; the model has {facts.vocab_size}"
            )
            back = tokenizer.decode(ids)
            assert back == text, f"{text!r} came back as {back!r}"


def tensors_of(file: Path) -> dict[str, Any]:
    """Names, dtypes and shapes of a safetensors file, whose header must fit its data."""
    with file.open("rb") as f:
        size = struct.unpack("<Q", f.read(8).ljust(8, b"\0"))[0]
        assert size < file.stat().st_size, (
            f"{file.name}: a header of {size} bytes in a file of {file.stat().st_size}"
        )
        header: dict[str, Any] = json.loads(f.read(size))
    header.pop("__metadata__", None)
    ends = []
    for name, tensor in header.items():
        begin, end = tensor["data_offsets"]
        bits = BITS.get(tensor["dtype"])
        assert bits, f"{file.name}: tensor {name} has the unknown dtype {tensor['dtype']}"
        wanted = math.prod(tensor["shape"]) * bits // 8
        assert end - begin == wanted, (
            f"{file.name}: tensor {name} has {end - begin} bytes, and its shape asks for {wanted}"
        )
        ends.append(end)
    there = file.stat().st_size - 8 - size
    assert max(ends, default=0) == there, (
        f"{file.name}: tensors end at byte {max(ends, default=0)} of {there}"
    )
    return header
