"""Provide the simulated worker as an installable plugin, to test discovery, processes and servers
without torch.

`install(site)` creates the distribution `dovetail-simulated` in a folder that is put on PYTHONPATH;
`make_model(folder)` creates a model folder with a byte-level tokenizer and a chat template, but
without weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from dovetail.facts import window_of_layers
from dovetail.interfaces.attention import AttentionCapabilities
from dovetail.interfaces.worker import WorkerCapabilities
from dovetail.plugin.hookspecs import hookimpl
from dovetail.plugin.provider import Options, Provider
from dovetail.types import KVGroup
from dovetail_testing.simulated import Faults, SimulatedWorker

SIMULATED = {"worker": "simulated", "attention": "simulated"}
"""Settings that select this plugin, whatever else is installed."""
SPECIAL = ["<pad>", "<eos>", "<user>", "<assistant>", "<end>"]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


class SimulatedOptions(Options):
    """Faults to inject. See `Faults`."""

    raise_at: int | None = None
    exit_at: int | None = None
    hang_at: int | None = None
    step_seconds: float = 0.0
    load_seconds: float = 0.0


CAN = WorkerCapabilities(drafts=True, host_tier=True)


def _worker(context: Any, options: SimulatedOptions) -> SimulatedWorker:
    model = context.model
    block_size = context.option("kv_cache", "block_size")
    windows = [kind.window for kind in model.layer_kinds]
    groups = [
        KVGroup([i], "full" if w is None else "sliding", block_size, 64, w)
        for i, w in enumerate(windows)
    ]
    return SimulatedWorker(groups, model.vocab_size, faults=Faults(**options.model_dump()))


@hookimpl
def dovetail_workers() -> list[Provider[SimulatedWorker]]:
    return [
        Provider(
            "simulated",
            "no model: outputs depend on the contents of the cache",
            _worker,
            SimulatedOptions,
            CAN,
        )
    ]


@hookimpl
def dovetail_attention() -> list[Provider[None]]:
    can = AttentionCapabilities(sliding_window=True, logit_soft_cap=True, sinks=True)
    return [
        Provider(
            "simulated",
            "never called: the simulated worker has no layers",
            lambda c, o: None,
            capabilities=can,
        )
    ]


def install(
    site: Path, module: str = __name__, name: str = "simulated", version: str = "0.1.0"
) -> None:
    """Write the metadata of a distribution into `site`, as pip would for a package with only an
    entry point."""
    info = site / f"dovetail_{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: dovetail-{name}\nVersion: {version}\nSummary: for tests\n"
    )
    (info / "entry_points.txt").write_text(f"[dovetail]\n{name} = {module}\n")


def make_model(folder: Path, *, max_len: int = 256, window: int | None = None) -> Path:
    """Create a model folder for the simulated worker: config.json, tokenizer (one token per byte)
    and chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<eos>", "chat_template": TEMPLATE})
    )
    config = {
        "architectures": ["SimulatedForCausalLM"],
        "model_type": "simulated",
        "dtype": "float32",
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "vocab_size": len(vocab),
        "max_position_embeddings": max_len,
        "eos_token_id": 1,
        "sliding_window": window,
        "layer_types": ["full_attention", "sliding_attention"],
    }
    assert len(window_of_layers(config)) == 2
    (folder / "config.json").write_text(json.dumps(config))
    return folder
