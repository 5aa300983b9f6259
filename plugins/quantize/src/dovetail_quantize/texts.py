"""Text as windows of tokens: what is calibrated on, and what the perplexity is measured on."""

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
    """i64[num, sample_len]; none if nothing is measured."""
    evaluation: Tensor
    """i64[num, sample_len]; none if there is no text for it."""
    remark: str
    """What the perplexity is measured on, or why it is not."""
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
    """Raises `ConfigError` for files that cannot be read, or hold too little. `needed`: the scheme
    calibrates."""
    if min(num_samples, sample_len - 1, num_evaluated) < 1:
        raise ConfigError(
            "--num-samples and --num-evaluated are at least 1, --sample-len at least 2"
        )
    if needed and calibration is None:
        raise ConfigError(
            "--calibration FILE is needed: this scheme measures activations on a text like the"
            " model's own use"
        )
    empty = torch.empty((0, sample_len), dtype=torch.long)
    chosen, rest, remark = empty, empty, "no text was given"
    tokenizer = Tokenizer(folder) if calibration or evaluation else None
    if calibration is not None and tokenizer is not None:
        rest = _windows(tokenizer, calibration, sample_len, "--calibration")
        remark = f"{calibration.name}, on which nothing was calibrated"
        if needed:
            if len(rest) < num_samples:
                tokens = (
                    f"{len(rest)} windows of {sample_len} tokens, and --num-samples is"
                    f" {num_samples}"
                )
                less = f", --num-samples {len(rest)}" if len(rest) else ""
                hint = f"Give more text{less} or a smaller --sample-len"
                raise ConfigError(f"--calibration {calibration}: too short: {tokens}. {hint}")
            places = _spread(len(rest), num_samples)
            chosen = rest[places]
            rest = rest[[i for i in range(len(rest)) if i not in set(places)]]
            remark = (
                f"what the calibration left of {calibration.name}"
                if len(rest)
                else "the calibration took all of its text"
            )
    if evaluation is not None and tokenizer is not None:
        rest, remark = _windows(tokenizer, evaluation, sample_len, "--evaluation"), evaluation.name
        if not len(rest):
            raise ConfigError(
                f"--evaluation {evaluation}: too short: less than one window of {sample_len} tokens"
            )
    rest = rest[_spread(len(rest), min(num_evaluated, len(rest)))]
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


def _spread(total: int, wanted: int) -> list[int]:
    """`wanted` of `total` places, evenly."""
    return [i * total // wanted for i in range(wanted)]
