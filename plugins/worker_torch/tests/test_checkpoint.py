"""Reading checkpoints: what arrives where, and every way in which a model folder can be wrong."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dense
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dovetail.errors import CheckpointError
from dovetail.interfaces.architecture import Target
from dovetail_models_torch.decoder import Decoder
from dovetail_worker_torch.loading.checkpoint import INDEX, SINGLE, load_tensors
from dovetail_worker_torch.loading.linear import TorchLinear

H, FFN, HEADS, KV_HEADS, D, VOCAB = 32, 48, 4, 2, 8, 61
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": H,
    "intermediate_size": FFN,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "vocab_size": VOCAB,
    "tie_word_embeddings": False,
    "dtype": "float32",
}


def ignore(*_: object) -> None:
    pass


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    model = dense.load(folder, dtype)
    assert isinstance(model, Decoder)
    return model


def write(folder: Path, tensors: dict[str, Tensor], *shards: set[str]) -> None:
    """One file, or one for each set of names with an index."""
    if not shards:
        save_file(tensors, folder / SINGLE)
        return
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file({name: tensors[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def configure(folder: Path, **changes: Any) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    seed = random.SystemRandom().randrange(2**31)
    print(f"seed {seed}")
    torch.manual_seed(seed)
    shapes = {
        "model.embed_tokens.weight": (VOCAB, H),
        "model.norm.weight": (H,),
        "lm_head.weight": (VOCAB, H),
    }
    for i in range(2):
        name = f"model.layers.{i}"
        shapes |= {
            f"{name}.input_layernorm.weight": (H,),
            f"{name}.post_attention_layernorm.weight": (H,),
        }
        shapes |= {
            f"{name}.self_attn.{p}_proj.weight": (n * D, H)
            for p, n in zip("qkv", (HEADS, KV_HEADS, KV_HEADS), strict=True)
        }
        shapes |= {
            f"{name}.self_attn.o_proj.weight": (H, HEADS * D),
            f"{name}.mlp.down_proj.weight": (H, FFN),
        }
        shapes |= {f"{name}.mlp.{p}_proj.weight": (FFN, H) for p in ("gate", "up")}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


@pytest.fixture
def folder(tmp_path: Path, tensors: dict[str, Tensor]) -> Path:
    """A checkpoint in which nothing is wrong."""
    configure(tmp_path)
    write(tmp_path, tensors)
    return tmp_path


def same(model: Decoder, tensors: dict[str, Tensor]) -> bool:
    targets = model.targets().items()
    return all(
        torch.equal(target.store.__self__, tensors[name].to(target.dtype))
        for name, target in targets
    )


def test_fused_weights_are_their_parts_one_after_the_other(
    folder: Path, tensors: dict[str, Tensor]
) -> None:
    model = load(folder)
    assert set(model.targets()) == set(tensors)
    assert same(model, tensors)
    layer = model.layers[1]
    assert isinstance(layer.qkv_proj, TorchLinear)
    assert isinstance(layer.gate_up_proj, TorchLinear)
    parts = [tensors[f"model.layers.1.self_attn.{p}_proj.weight"] for p in "qkv"]
    assert torch.equal(layer.qkv_proj.weight, torch.cat(parts))
    parts = [tensors[f"model.layers.1.mlp.{p}_proj.weight"] for p in ("gate", "up")]
    assert torch.equal(layer.gate_up_proj.weight, torch.cat(parts))


def test_weights_are_copies_of_the_file(folder: Path, tensors: dict[str, Tensor]) -> None:
    """A view of the mapped file would be read from disk in the first step, and change with the
    file."""
    model = load(folder)
    save_file({name: torch.zeros_like(t) for name, t in tensors.items()}, folder / SINGLE)
    assert same(model, tensors)


def test_shards_are_one_file(folder: Path, tensors: dict[str, Tensor]) -> None:
    (folder / SINGLE).unlink()
    names = sorted(tensors, key=lambda _: random.random())
    write(folder, tensors, set(names[:3]), set(names[3:9]), set(names[9:]))
    assert same(load(folder), tensors)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64])
def test_floating_types_are_converted(
    folder: Path, tensors: dict[str, Tensor], stored: torch.dtype
) -> None:
    tensors = {name: t.to(stored) for name, t in tensors.items()}
    write(folder, tensors)
    for dtype in (torch.float32, torch.bfloat16):
        assert same(load(folder, dtype), tensors)


def test_tied_output_is_the_embedding(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Whether or not it was saved a second time. A different one goes before what the config says,
    as in transformers."""
    configure(folder, tie_word_embeddings=True)
    embedding, hidden = tensors["model.embed_tokens.weight"], torch.randn(3, H)
    without = {name: t for name, t in tensors.items() if name != "lm_head.weight"}
    for present in (without, without | {"lm_head.weight": embedding.clone()}):
        write(folder, present)
        model = load(folder)
        assert model.lm_head is model.embedding
        assert torch.equal(model.logits(hidden), hidden @ embedding.T)
    write(folder, tensors)
    assert torch.equal(load(folder).logits(hidden), hidden @ tensors["lm_head.weight"].T)


def test_old_rotary_buffers_are_passed_over(folder: Path, tensors: dict[str, Tensor]) -> None:
    write(folder, tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.randn(D // 2)})
    assert same(load(folder), tensors)


def test_progress_counts_bytes_and_ends_at_the_total(folder: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    dense.load(folder, progress=lambda *call: calls.append(call))
    done = [call[1] for call in calls]
    assert done == sorted(done)
    assert {call[2] for call in calls} == {(folder / SINGLE).stat().st_size}
    assert done[-1] == calls[-1][2]


def test_integers_are_not_converted(tmp_path: Path) -> None:
    packed = torch.randint(99, (4,), dtype=torch.int32)
    save_file({"packed": packed}, tmp_path / SINGLE)
    kept = torch.empty(4, dtype=torch.int32)
    load_tensors(tmp_path, {"packed": Target.into(kept)}, progress=ignore)
    assert torch.equal(kept, packed)
    with pytest.raises(
        CheckpointError, match="packed is stored as int32, which cannot be loaded as float32"
    ):
        load_tensors(tmp_path, {"packed": Target.into(torch.empty(4))}, progress=ignore)


# What is done to a good folder, and what the error says. Each names the file or the folder.
Damage = Callable[[Path, dict[str, Tensor]], None]


def without_shard(folder: Path, tensors: dict[str, Tensor]) -> None:
    (folder / SINGLE).unlink()
    write(folder, tensors, set(tensors) - {"lm_head.weight"}, {"lm_head.weight"})
    (folder / "model-00002-of-00002.safetensors").unlink()


def shard_without_tensor(folder: Path, tensors: dict[str, Tensor]) -> None:
    (folder / SINGLE).unlink()
    write(folder, tensors, set(tensors) - {"lm_head.weight"}, {"lm_head.weight"})
    save_file({"other": torch.zeros(1)}, folder / "model-00002-of-00002.safetensors")


def index_without_tensor(folder: Path, tensors: dict[str, Tensor]) -> None:
    (folder / SINGLE).unlink()
    write(folder, tensors, set(tensors) - {"lm_head.weight"}, {"lm_head.weight"})
    index = json.loads((folder / INDEX).read_text())
    del index["weight_map"]["lm_head.weight"]
    (folder / INDEX).write_text(json.dumps(index))


def index_out_of_the_folder(folder: Path, tensors: dict[str, Tensor]) -> None:
    (folder / INDEX).write_text(
        json.dumps({"weight_map": {"lm_head.weight": "../elsewhere.safetensors"}})
    )


def without_index(folder: Path, tensors: dict[str, Tensor]) -> None:
    (folder / SINGLE).rename(folder / "model-00001-of-00001.safetensors")


def truncated(folder: Path, tensors: dict[str, Tensor]) -> None:
    data = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(data[: len(data) * 2 // 3])


def pickled_only(folder: Path, tensors: dict[str, Tensor]) -> None:
    (folder / SINGLE).rename(folder / "pytorch_model.bin")


def missing_seven(folder: Path, tensors: dict[str, Tensor]) -> None:
    write(
        folder,
        {
            name: t
            for name, t in tensors.items()
            if "layers.1.self" not in name and "layers.1.mlp" not in name
        },
    )


def other_shape(folder: Path, tensors: dict[str, Tensor]) -> None:
    write(folder, tensors | {"model.layers.0.mlp.up_proj.weight": torch.zeros(H, FFN)})


def other_type(folder: Path, tensors: dict[str, Tensor]) -> None:
    write(folder, tensors | {"model.norm.weight": torch.zeros(H, dtype=torch.int8)})


def scaled_type(folder: Path, tensors: dict[str, Tensor]) -> None:
    write(folder, tensors | {"lm_head.weight": torch.zeros(VOCAB, H).to(torch.float8_e4m3fn)})


def surplus(folder: Path, tensors: dict[str, Tensor]) -> None:
    write(folder, tensors | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(HEADS * D)})


def third_layer(folder: Path, tensors: dict[str, Tensor]) -> None:
    write(folder, tensors | {"model.layers.2.input_layernorm.weight": torch.zeros(H)})


WRONG: list[tuple[Damage, str]] = [
    (
        without_shard,
        r"lacks model-00002-of-00002.safetensors, named by model.safetensors.index.json",
    ),
    (shard_without_tensor, r"model-00002-of-00002.safetensors does not hold lm_head.weight"),
    (index_without_tensor, r"lacks lm_head.weight, which the model"),
    (
        index_out_of_the_folder,
        r"index.json: lm_head.weight must be in a safetensors file of this folder",
    ),
    (
        without_index,
        (
            r"has neither model.safetensors nor .*, so model-00001-of-00001.safetensors cannot be"
            r" told apart"
        ),
    ),
    (truncated, r"model.safetensors is truncated or not a safetensors file"),
    (
        lambda f, _: (f / SINGLE).write_bytes(b""),
        r"model.safetensors is truncated or not a safetensors file",
    ),
    (
        lambda f, _: (f / SINGLE).write_bytes(bytes(range(256)) * 9),
        r"model.safetensors is truncated or not a safetensors file",
    ),
    (lambda f, _: (f / INDEX).write_text("{"), r"index.json cannot be read"),
    (lambda f, _: (f / INDEX).write_text("{}"), r"index.json: weight_map must say which file"),
    (pickled_only, r"pickled weights only \(pytorch_model.bin\).* convert them to safetensors"),
    (lambda f, _: (f / SINGLE).unlink(), r"has no weights: expected model.safetensors"),
    (
        missing_seven,
        r"lacks (model.layers.1.[a-z_.]+, ){4}model.layers.1.[a-z_.]+ and 2 more, which the model",
    ),
    (
        other_shape,
        (
            rf"model.safetensors: model.layers.0.mlp.up_proj.weight has shape \[{H}, {FFN}\].* for"
            rf" \[{FFN}, {H}\]"
        ),
    ),
    (
        other_type,
        (
            r"model.safetensors: model.norm.weight is stored as int8, which cannot be loaded as"
            r" float32"
        ),
    ),
    (scaled_type, r"lm_head.weight is stored as float8_e4m3fn, which cannot be loaded as float32"),
    (surplus, r"holds model.layers.0.self_attn.q_proj.bias, which the model .* does not have"),
    (third_layer, r"holds model.layers.2.input_layernorm.weight, which the model .* does not have"),
    (lambda f, _: (f / "config.json").unlink(), r"config.json is missing"),
    (
        lambda f, _: configure(f, hidden_size="32"),
        r"config.json: hidden_size must be a positive integer, found '32'",
    ),
    (
        lambda f, _: configure(f, num_key_value_heads=3),
        r"config.json: 4 query heads cannot share 3 key/value heads",
    ),
    (
        lambda f, _: configure(f, hidden_act="maxout"),
        r"config.json: hidden_act 'maxout' is not supported; known are silu",
    ),
    (
        lambda f, _: configure(f, rope_scaling={"type": "su"}),
        r"config.json: rope_type 'su' is not supported; known are",
    ),
    (
        lambda f, _: configure(f, rope_scaling={"type": "linear"}),
        r"config.json: rope_type 'linear' needs 'factor'",
    ),
    (
        lambda f, _: configure(f, architectures=[]),
        r"config.json: architectures must name the model's one architecture",
    ),
]


@pytest.mark.parametrize(
    ("damage", "message"), WRONG, ids=[re.sub(r"\W+", " ", message)[:40] for _, message in WRONG]
)
def test_what_is_wrong_is_said(
    folder: Path, tensors: dict[str, Tensor], damage: Damage, message: str
) -> None:
    damage(folder, tensors)
    with pytest.raises(CheckpointError, match=message) as e:
        load(folder)
    assert str(folder) in str(e.value)


def test_a_model_is_not_changed_by_reading_it(folder: Path, tensors: dict[str, Tensor]) -> None:
    before = load_file(folder / SINGLE)
    load(folder).forward(torch.tensor([1, 2]), torch.tensor([0, 1]), lambda _i, q, _k, _v: q)
    assert all(torch.equal(before[name], t) for name, t in load_file(folder / SINGLE).items())
