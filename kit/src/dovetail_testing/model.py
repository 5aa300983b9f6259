"""Test the contract of the model extension point. A plugin's test is a subclass:

    class TestMyModel(ModelContract):
        provider = PROVIDER

The docstrings of its checks state the requirements.
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
    """The contract of model providers. Subclass it and set `provider`."""

    extension_point = "model"

    @property
    def source(self) -> ModelSource:
        """The source, built as the core does it: without a context, because there is no plan
        yet."""
        source = self.provider.build(None, self.provider.options.model_validate(self.options))  # type: ignore[arg-type]
        assert isinstance(source, ModelSource), (
            f"build returned a {type(source).__name__}, not a ModelSource"
        )
        return source

    @property
    def facts(self) -> ModelFacts:
        return model_facts(self.source.folder)

    @common_causes(
        "the path is relative",
        "the wheel lacks the package data",
        "the licence of the weights is not stated",
    )
    def test_declaration(self) -> None:
        """`build` returns an existing folder, the same one each time, and states the licence of the
        model."""
        source = self.source
        assert source.folder.is_absolute(), (
            f"{source.folder} is relative: it depends on the working directory"
        )
        assert source.folder.is_dir(), f"{source.folder} is not a folder"
        assert source == self.source, f"two builds returned {source} and {self.source}"
        assert source.licence.strip(), "the licence is empty"

    @common_causes("config.json omits a key for which transformers has a default")
    def test_the_config_says_what_is_asked(self) -> None:
        """config.json has what the selection of providers needs: architecture, sizes, context
        length, layer kinds and end-of-sequence tokens."""
        facts = self.facts
        assert facts.architecture, "config.json names no architecture"
        assert facts.num_heads % facts.num_kv_heads == 0, (
            f"{facts.num_heads} heads are not a multiple of {facts.num_kv_heads} KV heads"
        )
        assert facts.layer_kinds, "the model has no layers"
        assert facts.eos_token_ids, (
            "there is no end-of-sequence token, so no output would end by itself"
        )
        ends, size = facts.eos_token_ids, facts.vocab_size
        assert all(0 <= t < size for t in ends), (
            f"the end-of-sequence tokens are {ends}, but the vocabulary has {size} tokens"
        )

    @common_causes(
        "a file was truncated when the package was built",
        "an index names files that do not exist",
    )
    def test_the_weights_are_whole(self) -> None:
        """The weights are safetensors files whose headers match their data, with each tensor in one
        file; the folder contains no pickled files."""
        folder = self.source.folder
        unsafe = sorted(p.name for p in folder.iterdir() if p.suffix in UNSAFE)
        assert not unsafe, (
            f"{unsafe} are pickled files, which can run code: convert them to safetensors"
        )
        files = sorted(folder.glob("*.safetensors"))
        assert files, f"there are no *.safetensors files in {folder}"
        where: dict[str, str] = {}
        for file in files:
            for name in tensors_of(file):
                assert name not in where, f"tensor {name} is in {where[name]} and in {file.name}"
                where[name] = file.name
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            index_files = json.loads(index.read_text())["weight_map"]
            wrong = {
                name: (file, where.get(name))
                for name, file in index_files.items()
                if where.get(name) != file
            }
            assert not wrong, f"the index is wrong about tensors (index, actual file): {wrong}"

    @common_causes("a normalizer changes the text", "tokenizer.json has no decoder")
    def test_the_tokenizer_keeps_texts(self) -> None:
        """Encoding and decoding returns every text unchanged, with token ids of the model."""
        facts, tokenizer = self.facts, Tokenizer(self.source.folder)
        assert tokenizer.vocab_size <= facts.vocab_size, (
            f"the tokenizer has {tokenizer.vocab_size} tokens, but the model {facts.vocab_size}"
        )
        for text in TEXTS:
            ids = tokenizer.encode(text, add_special_tokens=False)
            assert all(0 <= t < facts.vocab_size for t in ids), (
                f"{text!r} has tokens {ids}; the model has {facts.vocab_size}"
            )
            back = tokenizer.decode(ids)
            assert back == text, f"{text!r} was decoded as {back!r}"


def tensors_of(file: Path) -> dict[str, Any]:
    """Read the header of a safetensors file and check that it matches the data."""
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
            f"{file.name}: tensor {name} has {end - begin} bytes, but its shape needs {wanted}"
        )
        ends.append(end)
    num_bytes = file.stat().st_size - 8 - size
    assert max(ends, default=0) == num_bytes, (
        f"{file.name}: tensors end at byte {max(ends, default=0)} of {num_bytes}"
    )
    return header
