"""Split text into windows of tokens for calibration and for measuring perplexity."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dovetail.errors import ConfigError
from dovetail.frontend.tokenizer import Tokenizer


@dataclass(frozen=True)
class Texts:
    calibration: Tensor
    """i64[num, sample_len]; empty if nothing is measured."""
    evaluation: Tensor
    """i64[num, sample_len]; empty if there is no evaluation text."""
    remark: str
    """Description of the evaluation text, or the reason why there is none."""
    fingerprint: str


def read_texts(
    folder: Path,
    calibration: Path | None,
    evaluation: Path | None,
    *,
    needed: bool,
    num_samples: int,
    sample_len: int,
    num_evaluated: int,
) -> Texts:
    """Read the calibration and evaluation windows. `needed` is true if the scheme needs
    calibration. Raises `ConfigError` for files that cannot be read or are too short."""
    if min(num_samples, sample_len - 1, num_evaluated) < 1:
        raise ConfigError(
            "--num-samples and --num-evaluated must be at least 1, and --sample-len at least 2"
        )
    if needed and calibration is None:
        raise ConfigError(
            "--calibration FILE is required: this scheme measures activations on text that should"
            " resemble the model's use"
        )
    empty = torch.empty((0, sample_len), dtype=torch.long)
    chosen, rest, remark = empty, empty, "no text was given"
    tokenizer = Tokenizer(folder) if calibration or evaluation else None
    if calibration is not None and tokenizer is not None:
        rest = _windows(tokenizer, calibration, sample_len, "--calibration")
        remark = f"{calibration.name}, which was not used for calibration"
        if needed:
            if len(rest) < num_samples:
                tokens = (
                    f"{len(rest)} windows of {sample_len} tokens, but --num-samples is"
                    f" {num_samples}"
                )
                less = f", --num-samples {len(rest)}" if len(rest) else ""
                hint = f"Give more text{less} or a smaller --sample-len"
                raise ConfigError(f"--calibration {calibration}: too short: {tokens}. {hint}")
            indices = _evenly_spaced(len(rest), num_samples)
            chosen = rest[indices]
            rest = rest[[i for i in range(len(rest)) if i not in set(indices)]]
            remark = (
                f"the windows of {calibration.name} not used for calibration"
                if len(rest)
                else "calibration used the whole text"
            )
    if evaluation is not None and tokenizer is not None:
        rest, remark = _windows(tokenizer, evaluation, sample_len, "--evaluation"), evaluation.name
        if not len(rest):
            raise ConfigError(
                f"--evaluation {evaluation}: too short: less than one window of {sample_len} tokens"
            )
    rest = rest[_evenly_spaced(len(rest), min(num_evaluated, len(rest)))]
    digest = hashlib.sha256(chosen.numpy().tobytes() + b"|" + rest.numpy().tobytes()).hexdigest()[
        :16
    ]
    return Texts(chosen, rest, remark, digest)


def _windows(tokenizer: Tokenizer, path: Path, length: int, option: str) -> Tensor:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{option} {path} cannot be read as text: {e}") from None
    if not text.strip():
        raise ConfigError(f"{option} {path} is empty")
    tokens = torch.tensor(tokenizer.encode(text))
    return tokens[: len(tokens) // length * length].view(-1, length)


def _evenly_spaced(total: int, count: int) -> list[int]:
    """Return `count` evenly spaced indices below `total`."""
    return [i * total // count for i in range(count)]
