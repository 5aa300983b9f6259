"""Mistakes that model packages make, over a tiny Llama."""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path

from dovetail.interfaces.model import ModelSource
from dovetail.plugin.provider import Provider
from dovetail_testing.tiny_model import TinyModel
from sabotage import Sabotages


@functools.cache
def folder_with(damage) -> Path:
    """The model's folder, once `damage(folder)` was called with it."""
    folder = Path(tempfile.mkdtemp(prefix="dovetail-"))
    atexit.register(shutil.rmtree, folder)
    TinyModel(0).write(folder)
    damage(folder)
    return folder


def source(damage):
    return lambda context, options: ModelSource(folder_with(damage), licence="none: random numbers")


SABOTAGES = Sabotages("model", Provider("tiny", "for tests", source(lambda folder: None)))
DECLARED, CONFIG, WEIGHTS, TOKENIZER = (
    "test_declaration",
    "test_the_config_says_what_is_asked",
    "test_the_weights_are_whole",
    "test_the_tokenizer_keeps_texts",
)


def sabotage(*caught_by):
    return lambda damage: SABOTAGES.add(damage, caught_by, build=source(damage))


def change_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@sabotage(CONFIG, WEIGHTS, TOKENIZER)
def wrong_folder(folder):
    """The folder is one above the model's."""
    inner = folder / "model"
    inner.mkdir()
    for path in [p for p in folder.iterdir() if p != inner]:
        path.rename(inner / path.name)


def no_such_folder(context, options):
    """The folder was left out of the package."""
    return ModelSource(Path(__file__).parent / "no-such-weights", licence="none")


def relative_folder(context, options):
    """The folder is relative to where the program was started."""
    return ModelSource(Path("weights"), licence="none")


def no_licence(context, options):
    """It is not said under what licence the weights are."""
    return ModelSource(folder_with(str))


def another_each_time(context, options):
    """Every build writes the model into another folder."""
    return ModelSource(folder_with(lambda folder: None), licence="none")


for build in (no_such_folder, relative_folder, no_licence, another_each_time):
    SABOTAGES.add(build, (DECLARED,), build=build)


@sabotage(TOKENIZER)
def missing_tokenizer(folder):
    """There is no tokenizer."""
    (folder / "tokenizer.json").unlink()


@sabotage(TOKENIZER)
def lower_case(folder):
    """The tokenizer writes everything small."""
    change_json(folder / "tokenizer.json", normalizer={"type": "Lowercase"})


@sabotage(TOKENIZER)
def missing_decoder(folder):
    """The tokenizer does not turn its tokens back into text."""
    change_json(folder / "tokenizer.json", decoder=None)


@sabotage(TOKENIZER)
def vocabulary_too_small(folder):
    """The model has fewer tokens than its tokenizer."""
    change_json(folder / "config.json", vocab_size=200)


@sabotage(CONFIG)
def no_end(folder):
    """There is no end-of-sequence token."""
    change_json(folder / "config.json", eos_token_id=None)


@sabotage(CONFIG)
def end_that_does_not_exist(folder):
    """The end-of-sequence token is past the vocabulary."""
    change_json(folder / "config.json", eos_token_id=300)


@sabotage(CONFIG)
def heads_that_do_not_share(folder):
    """The heads cannot be divided among the KV heads."""
    change_json(folder / "config.json", num_attention_heads=3, num_key_value_heads=2)


@sabotage(WEIGHTS)
def cut_short(folder):
    """The weights are cut short."""
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


@sabotage(WEIGHTS)
def pickled_weights(folder):
    """There are pickled weights beside the safe ones."""
    (folder / "pytorch_model.bin").write_bytes(b"")


@sabotage(WEIGHTS)
def no_weights(folder):
    """There are no weights."""
    (folder / "model.safetensors").unlink()


@sabotage(WEIGHTS)
def index_of_another(folder):
    """The index names files that are not there."""
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@sabotage(WEIGHTS)
def a_tensor_twice(folder):
    """Every tensor is in two files."""
    shutil.copy(folder / "model.safetensors", folder / "copy.safetensors")
