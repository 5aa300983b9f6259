"""Provide a tiny Llama with random weights: its checkpoint, written without a tensor library, and
its expected logits, computed in plain Python in double precision, token by token.
"""

from __future__ import annotations

import json
import math
import random
import struct
from array import array
from dataclasses import dataclass, field
from operator import mul
from pathlib import Path

from dovetail_testing.plugin import make_model

HIDDEN, HEADS, KV_HEADS, HEAD_SIZE, INNER, LAYERS = 32, 2, 1, 16, 48, 2
EPSILON, THETA, MAX_LEN = 1e-5, 10_000.0, 512
Vector = list[float]


@dataclass
class Matrix:
    """A matrix [rows, columns] of float32 values."""

    rows: list[Vector]

    def __matmul__(self, x: Vector) -> Vector:
        return [sum(map(mul, row, x)) for row in self.rows]

    @staticmethod
    def random(rng: random.Random, rows: int, columns: int, spread: float) -> Matrix:
        return Matrix(
            [list(array("f", (rng.gauss(0, spread) for _ in range(columns)))) for _ in range(rows)]
        )


@dataclass
class TinyModel:
    """A tiny Llama. `write` writes its checkpoint; `logits` computes its logits."""

    seed: int
    weights: dict[str, Matrix] = field(init=False)
    vocab_size: int = 261

    def __post_init__(self) -> None:
        rng = random.Random(self.seed)
        query, kv = HEADS * HEAD_SIZE, KV_HEADS * HEAD_SIZE

        def normal(rows: int, columns: int, spread: float = 1.5) -> Matrix:
            return Matrix.random(rng, rows, columns, spread / math.sqrt(columns))

        self.weights = {
            "model.embed_tokens.weight": Matrix.random(rng, self.vocab_size, HIDDEN, 1.0)
        }
        for i in range(LAYERS):
            at = f"model.layers.{i}"
            for name, rows, columns in (
                ("self_attn.q_proj", query, HIDDEN),
                ("self_attn.k_proj", kv, HIDDEN),
                ("self_attn.v_proj", kv, HIDDEN),
                ("self_attn.o_proj", HIDDEN, query),
                ("mlp.gate_proj", INNER, HIDDEN),
                ("mlp.up_proj", INNER, HIDDEN),
                ("mlp.down_proj", HIDDEN, INNER),
            ):
                self.weights[f"{at}.{name}.weight"] = normal(rows, columns)
            for name in ("input_layernorm", "post_attention_layernorm"):
                self.weights[f"{at}.{name}.weight"] = _norm_weight(rng)
        self.weights["model.norm.weight"] = _norm_weight(rng)
        self.weights["lm_head.weight"] = normal(self.vocab_size, HIDDEN, 3.0)

    def write(self, folder: Path, *, broken: bool = False) -> Path:
        """Write a model folder. With `broken`, the last norm contains NaN, and so does every
        logit."""
        make_model(folder, max_len=MAX_LEN)
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "dtype": "float32",
            "hidden_size": HIDDEN,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "head_dim": HEAD_SIZE,
            "intermediate_size": INNER,
            "vocab_size": self.vocab_size,
            "hidden_act": "silu",
            "max_position_embeddings": MAX_LEN,
            "rms_norm_eps": EPSILON,
            "rope_theta": THETA,
            "eos_token_id": 1,
            "bos_token_id": 0,
            "tie_word_embeddings": False,
            "attention_bias": False,
            "mlp_bias": False,
        }
        (folder / "config.json").write_text(json.dumps(config))
        tensors: Tensors = {}
        for name, matrix in self.weights.items():
            rows = [[math.nan] * HIDDEN] if broken and name == "model.norm.weight" else matrix.rows
            tensors[name] = (
                "F32",
                [HIDDEN] if "norm" in name else [len(rows), len(rows[0])],
                floats(rows),
            )
        write_tensors(folder, tensors)
        return folder

    def run(self) -> Run:
        return Run(self)

    def logits(self, tokens: list[int]) -> list[Vector]:
        """Return the logits after each of the tokens."""
        run = self.run()
        return [run.step(t) for t in tokens]


class Run:
    """One sequence with its keys and values so far."""

    def __init__(self, model: TinyModel) -> None:
        self.model = model
        self.keys: list[list[Vector]] = [[] for _ in range(LAYERS)]
        self.values: list[list[Vector]] = [[] for _ in range(LAYERS)]

    def step(self, token: int) -> Vector:
        """Process the next token and return the logits after it."""
        weights = self.model.weights
        x = weights["model.embed_tokens.weight"].rows[token]
        for i in range(LAYERS):
            w = {name: weights[f"model.layers.{i}.{name}.weight"] for name in _PARTS}
            h = _norm(x, w["input_layernorm"])
            x = _add(x, w["self_attn.o_proj"] @ self._attend(i, w, h))
            h = _norm(x, w["post_attention_layernorm"])
            inner = [
                g / (1 + math.exp(-g)) * u
                for g, u in zip(w["mlp.gate_proj"] @ h, w["mlp.up_proj"] @ h, strict=True)
            ]
            x = _add(x, w["mlp.down_proj"] @ inner)
        return weights["lm_head.weight"] @ _norm(x, weights["model.norm.weight"])

    def _attend(self, layer: int, w: dict[str, Matrix], h: Vector) -> Vector:
        position = len(self.keys[layer])
        q, k, v = (w[f"self_attn.{name}_proj"] @ h for name in "qkv")
        self.keys[layer].append(_rotate(k, position))  # one key/value head
        self.values[layer].append(v)
        out: Vector = []
        for head in range(HEADS):
            query = _rotate(q[head * HEAD_SIZE : (head + 1) * HEAD_SIZE], position)
            scores = [sum(map(mul, query, key)) / math.sqrt(HEAD_SIZE) for key in self.keys[layer]]
            weights = softmax(scores)
            out += [
                sum(p * v[d] for p, v in zip(weights, self.values[layer], strict=True))
                for d in range(HEAD_SIZE)
            ]
        return out


Tensors = dict[str, tuple[str, list[int], bytes]]
"""Tensors by name: dtype as in safetensors, shape, data."""


def floats(rows: list[Vector]) -> bytes:
    """Encode as float32."""
    return array("f", (x for row in rows for x in row)).tobytes()


def write_tensors(folder: Path, tensors: Tensors) -> None:
    """Write the folder's model.safetensors."""
    header, data = {}, bytearray()
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {
            "dtype": dtype,
            "shape": shape,
            "data_offsets": [len(data), len(data) + len(content)],
        }
        data += content
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)


_PARTS = (
    "input_layernorm",
    "post_attention_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


def softmax(logits: Vector) -> Vector:
    top = max(logits)
    exps = [math.exp(x - top) for x in logits]
    total = sum(exps)
    return [e / total for e in exps]


def _norm_weight(rng: random.Random) -> Matrix:
    return Matrix([list(array("f", (1 + rng.gauss(0, 0.2) for _ in range(HIDDEN))))])


def _norm(x: Vector, weight: Matrix) -> Vector:
    scale = 1 / math.sqrt(sum(v * v for v in x) / len(x) + EPSILON)
    return [v * scale * w for v, w in zip(x, weight.rows[0], strict=True)]


def _add(x: Vector, y: Vector) -> Vector:
    return [a + b for a, b in zip(x, y, strict=True)]


def _rotate(x: Vector, position: int) -> Vector:
    """Apply rotary embedding: element i is rotated with element i + HEAD_SIZE / 2."""
    half, out = HEAD_SIZE // 2, x[:]
    for i in range(half):
        angle = position * THETA ** (-2 * i / HEAD_SIZE)
        cos, sin = math.cos(angle), math.sin(angle)
        out[i], out[i + half] = x[i] * cos - x[i + half] * sin, x[i + half] * cos + x[i] * sin
    return out
