"""Check whether a model can draft for another one, and explain why if it cannot. Reads no
weights."""

from __future__ import annotations

from pathlib import Path

from dovetail.errors import CheckpointError, ConfigError
from dovetail.facts import ModelFacts, read_json

SHOWN = 3


def check_draft(name: str, draft: ModelFacts, target: ModelFacts, max_model_len: int) -> None:
    """Raise `ConfigError`, with the reasons, if the model `name` cannot draft for `target`."""
    reasons = []
    if draft.vocab_size != target.vocab_size:
        reasons.append(
            f"its vocabulary has {draft.vocab_size} tokens, that of the model {target.vocab_size}"
        )
    elif difference := _difference(draft.folder, target.folder):
        reasons.append(difference)
    if draft.max_position_embeddings < max_model_len:
        longest = draft.max_position_embeddings
        reasons.append(
            f"its context is shorter than max_model_len {max_model_len}: lower that to {longest}"
        )
    if draft.quantization_config is not None:
        reasons.append(
            f"its checkpoint is quantized with {draft.quantization_method}, but the weights of a"
            " draft model must not be quantized"
        )
    if reasons:
        raise ConfigError(
            f"speculation.model: {name!r} cannot draft for this model: {'; '.join(reasons)}"
        )


def _difference(draft: Path, target: Path) -> str:
    """Describe how the tokens of two model folders differ; return an empty string if each id means
    the same. If neither model has a tokenizer, only the size of the vocabulary counts."""
    target_ids, draft_ids = (_vocabulary(folder) for folder in (target, draft))
    if target_ids is None and draft_ids is None:
        return ""
    if target_ids is None or draft_ids is None:
        return (
            f"{'it' if draft_ids is None else 'the model'} has no tokenizer.json, so the tokenizers"
            " cannot be compared"
        )
    different = [
        t for t in target_ids.keys() | draft_ids.keys() if target_ids.get(t) != draft_ids.get(t)
    ]
    if not different:
        return ""
    different.sort(key=lambda t: (target_ids.get(t, -1), t))
    shown = [
        f"{t!r} is {_id(draft_ids, t)} instead of {_id(target_ids, t)}" for t in different[:SHOWN]
    ]
    return (
        f"its tokenizer differs: {len(different)} tokens differ"
        f" ({'; '.join(shown)}{'; …' * (len(different) > SHOWN)})"
    )


def _id(vocabulary: dict[str, int], token: str) -> str:
    return str(vocabulary.get(token, "missing"))


def _vocabulary(folder: Path) -> dict[str, int] | None:
    """Read ids by token from tokenizer.json, including added tokens. Returns None if the file does
    not exist."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    data = read_json(path)
    try:
        vocabulary = data["model"]["vocab"]
        if isinstance(vocabulary, list):  # unigram models: [token, score] by id
            vocabulary = {token: i for i, (token, _) in enumerate(vocabulary)}
        return {
            **vocabulary,
            **{added["content"]: added["id"] for added in data.get("added_tokens") or ()},
        }
    except (KeyError, TypeError, ValueError) as e:
        raise CheckpointError(
            f"{path} is not a readable tokenizer: {type(e).__name__}: {e}"
        ) from None
