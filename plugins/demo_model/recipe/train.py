"""Train the demo chat model, or its draft: a small Llama that knows the Python library reference.

Usage: train.py CORPUS.json MODEL_FOLDER [--start FOLDER] [--minutes 90]
                [--hidden 256 --layers 8 --heads 4 --kv-heads 2 --ffn 768]

MODEL_FOLDER must contain the tokenizer. --start is a checkpoint to continue from, whose shape is
then used. Runs on a GPU if there is one, otherwise on the CPU. Compute weights are bfloat16; the
optimizers (Muon for the matrices, AdamW for the embedding and the norms) keep float32 copies. The
learning rate decays linearly to zero at a time of day fixed at the start, so a run that is paused
(SIGSTOP) or slowed down still ends on time.
"""

import argparse
import json
import math
import pathlib
import random
import shutil
import time

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

ASK_DOC = [
    "Explain {n}.",
    "What is {n}?",
    "Describe {n}",
    "Tell me about {n}.",
    "{n}?",
    "How do I use {n}?",
    "what is {n} for?",
    "what does {n} do",
]
ASK_SIGNATURE = [
    "What is the signature of {n}?",
    "Show the signature of {n}.",
    "How do I call {n}?",
    "Which arguments does {n} take?",
]
ASK_EXAMPLE = ["Show an example of {n}.", "Give me an example that uses {n}."]
SYSTEM = [
    "You answer questions about the Python library.",
    "You are a helpful assistant.",
    "You know the Python documentation.",
]
# Every 25th documentation page is held out of training, for measuring perplexity.
HELD_OUT_EVERY = 25
# Lengths in characters of short entries. An epoch has a question about each of them, and about some
# of the others.
SHORT = range(31, 240)
IGNORED = -100


class Corpus:
    """Samples training rows: whole dialogues about library entries, and windows of documentation
    and source text.

    Dialogues come in epochs: each epoch has one question about every short entry, in shuffled
    order, so that all are seen equally often. In dialogues only answers are targets; text windows
    are targets throughout.
    """

    def __init__(self, corpus, tokenizer, seed, others):
        self.rng = random.Random(seed)
        self.short = [e for e in corpus["qa"] if len(e["doc"]) in SHORT]
        self.long = [e for e in corpus["qa"] if len(e["doc"]) not in SHORT]
        self.others = others
        self.epochs = 0
        self.encode = lambda text: tokenizer.encode(text).ids
        self.end, self.system, self.user, self.assistant = (
            tokenizer.token_to_id(t) for t in ("<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
        )
        texts = [[*self.encode(t), self.end] for t in corpus["texts"]]
        self.held_out = np.concatenate([np.array(t) for t in texts[::HELD_OUT_EVERY]])
        self.text = np.concatenate([np.array(t) for i, t in enumerate(texts) if i % HELD_OUT_EVERY])
        self.src = np.concatenate([np.array([*self.encode(s), self.end]) for s in corpus["src"]])
        self.waiting = self.dialogues()
        self.set_aside = []

    def turn(self, question, answer):
        """Return the tokens of one question with its answer, and their targets."""
        asked = [self.user, *self.encode(question), self.end, self.assistant]
        answered = [*self.encode(answer), self.end]
        return asked + answered, [IGNORED] * len(asked) + answered

    def turns(self):
        """Yield the turns of one epoch."""
        rng = self.rng
        entries = self.short + rng.sample(self.long, int(self.others * len(self.long)))
        rng.shuffle(entries)
        for entry in entries:
            ask = "What does {n} do?" if rng.random() < 0.6 else rng.choice(ASK_DOC)
            yield self.turn(ask.format(n=entry["name"]), entry["doc"])
            if rng.random() < 0.08:
                yield self.turn(rng.choice(ASK_SIGNATURE).format(n=entry["name"]), entry["sig"])
            if entry["ex"] and rng.random() < 0.15:
                yield self.turn(rng.choice(ASK_EXAMPLE).format(n=entry["name"]), entry["ex"])

    def dialogues(self):
        rng = self.rng
        while True:
            turns = list(self.turns())
            while turns:
                tokens = (
                    [self.system, *self.encode(rng.choice(SYSTEM)), self.end]
                    if rng.random() < 0.15
                    else []
                )
                targets = [IGNORED] * len(tokens)
                for _ in range(min(len(turns), rng.choice([1, 1, 1, 2, 3]))):
                    new = turns.pop()
                    tokens, targets = tokens + new[0], targets + new[1]
                yield tokens, targets
            self.epochs += 1

    def dialogue_row(self, length):
        """Fill a row with whole dialogues. Those that no longer fit are kept for the next rows."""
        tokens, targets, left = [], [], []
        for _ in range(12):
            new = self.set_aside.pop(0) if self.set_aside else next(self.waiting)
            if len(tokens) + len(new[0]) <= length + 1:
                tokens, targets = tokens + new[0], targets + new[1]
            elif len(new[0]) <= 512:
                left.append(new)
        self.set_aside = left + self.set_aside
        missing = length + 1 - len(tokens)
        return tokens + [0] * missing, targets + [IGNORED] * missing

    def batch(self, rows, length, text_share):
        """Return the inputs i64[rows, length] and the flattened targets i64[rows * length]."""
        rows = []
        for _ in range(rows):
            if self.rng.random() < text_share:
                source = self.text if self.rng.random() < 0.85 else self.src
                start = self.rng.randrange(len(source) - length - 1)
                rows.append([source[start : start + length + 1].tolist()] * 2)
            else:
                rows.append(self.dialogue_row(length))
        tokens, targets = torch.tensor(rows).unbind(1)
        return tokens[:, :-1].contiguous(), targets[:, 1:].flatten()


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalized updates (five Newton-Schulz steps). Matrices of the same shape
    are processed as one batch."""

    def __init__(self, matrices, lr, momentum=0.95, weight_decay=0.02):
        by_shape = {}
        for p in matrices:
            by_shape.setdefault(p.shape, []).append(p)
        super().__init__(
            [{"params": ps} for ps in by_shape.values()],
            {"lr": lr, "momentum": momentum, "weight_decay": weight_decay},
        )

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            grad = torch.stack([p.grad for p in group["params"]])
            kept = self.state[group["params"][0]].setdefault("momentum", torch.zeros_like(grad))
            kept.lerp_(grad, 1 - group["momentum"])
            x = grad.lerp_(kept, group["momentum"]).bfloat16()
            if tall := x.shape[1] > x.shape[2]:
                x = x.mT.contiguous()
            x /= x.norm(dim=(1, 2), keepdim=True) + 1e-7
            for _ in range(5):
                square = x @ x.mT
                x = torch.baddbmm(
                    x,
                    torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315),
                    x,
                    beta=3.4445,
                )
            x = x.mT if tall else x
            scale = 0.2 * math.sqrt(max(x.shape[1:]))  # matches the size of AdamW's updates
            for p, update in zip(group["params"], x, strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(
                    update, alpha=-group["lr"] * scale
                )


def new_model(a, tokenizer):
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=a.hidden,
            num_hidden_layers=a.layers,
            num_attention_heads=a.heads,
            num_key_value_heads=a.kv_heads,
            head_dim=64,
            intermediate_size=a.ffn,
            max_position_embeddings=2048,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.token_to_id("<|end|>"),
            pad_token_id=0,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        )
    )


def held_out_perplexity(model, tokens, length, device, rows=64):
    losses = []
    with torch.no_grad():
        for i in range(min(rows, len(tokens) // length - 1)):
            row = torch.tensor(tokens[i * length : (i + 1) * length + 1], device=device)[None]
            logits = model(input_ids=row[:, :-1]).logits.float()
            losses.append(torch.nn.functional.cross_entropy(logits[0], row[0, 1:]).item())
    return math.exp(sum(losses) / len(losses))


def save(model, folder, tokenizer_folder):
    """Write a checkpoint that can be used while training continues."""
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if folder != tokenizer_folder:
            shutil.copyfile(tokenizer_folder / name, folder / name)


def main():
    p = argparse.ArgumentParser()
    p.add_argument("corpus")
    p.add_argument("folder", type=pathlib.Path)
    p.add_argument("--start", type=pathlib.Path)
    for name, default in [
        ("hidden", 256),
        ("layers", 8),
        ("heads", 4),
        ("kv-heads", 2),
        ("ffn", 768),
        ("seq", 256),
        ("batch", 16),
        ("seed", 0),
    ]:
        p.add_argument(f"--{name}", type=int, default=default)
    for name, default in [
        ("minutes", 90.0),
        ("lr", 4e-3),
        ("embedding-lr", 2e-3),
        ("text-share", 0.12),
        ("others", 0.4),
        ("save-minutes", 10.0),
    ]:
        p.add_argument(f"--{name}", type=float, default=default)
    a = p.parse_args()
    started = time.time()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(a.seed)
    tokenizer = Tokenizer.from_file(str(a.folder / "tokenizer.json"))
    corpus = Corpus(json.loads(pathlib.Path(a.corpus).read_text()), tokenizer, a.seed, a.others)
    model = LlamaForCausalLM.from_pretrained(a.start) if a.start else new_model(a, tokenizer)
    masters = {
        n: p.detach().to(device, torch.float32, copy=True) for n, p in model.named_parameters()
    }
    model = model.to(device, torch.bfloat16).train()
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters", flush=True)
    matrices = [p for n, p in masters.items() if p.dim() == 2 and "embed" not in n]
    others = [p for n, p in masters.items() if p.dim() < 2 or "embed" in n]
    optimizers = [
        (Muon(matrices, a.lr), a.lr),
        (
            torch.optim.AdamW(
                others, a.embedding_lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True
            ),
            a.embedding_lr,
        ),
    ]

    @torch.compile(dynamic=False)
    def loss_of(inputs, positions, targets):
        hidden = model.model(input_ids=inputs, use_cache=False).last_hidden_state.flatten(0, 1)[
            positions
        ]
        return torch.nn.functional.cross_entropy(
            model.lm_head(hidden).float(), targets, ignore_index=IGNORED
        )

    step = tokens = answers = 0
    smoothed, saved = None, time.time()
    while (done := (time.time() - started) / 60 / a.minutes) < 1:
        for optimizer, lr in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1, (step + 1) / 100) * (1 - done)
        longer = 2 if step % 10 == 9 else 1  # every tenth batch: half as many rows of double length
        inputs, targets = corpus.batch(a.batch // longer, a.seq * longer, a.text_share)
        wanted = (targets != IGNORED).nonzero()[:, 0]
        # The number of targets is fixed, so that the step is compiled only once.
        most = int(0.85 * targets.numel())
        wanted = wanted[torch.randperm(len(wanted))[:most]] if len(wanted) > most else wanted
        positions = torch.nn.functional.pad(wanted, (0, most - len(wanted)))
        targets = torch.nn.functional.pad(targets[wanted], (0, most - len(wanted)), value=IGNORED)
        loss = loss_of(inputs.to(device), positions.to(device), targets.to(device))
        loss.backward()
        with torch.no_grad():
            for name, p in model.named_parameters():
                masters[name].grad, p.grad = p.grad.float(), None
            for optimizer, _ in optimizers:
                optimizer.step()
            for name, p in model.named_parameters():
                p.copy_(masters[name])
        step, tokens, answers = step + 1, tokens + inputs.numel(), answers + len(wanted)
        smoothed = loss.item() if smoothed is None else 0.98 * smoothed + 0.02 * loss.item()
        if step % 25 == 0:
            print(
                f"{time.strftime('%H:%M:%S')} step {step} loss {smoothed:.3f} done {done:.3f}"
                f" epochs {corpus.epochs} tokens {tokens / 1e6:.2f}M (targets {answers / 1e6:.2f}M)"
                f" {tokens / (time.time() - started):.0f}/s",
                flush=True,
            )
        if time.time() - saved > 60 * a.save_minutes:
            save(model, a.folder / "checkpoint", a.folder)
            saved = time.time()
    save(model, a.folder, a.folder)
    print(f"step {step} loss {smoothed:.3f} epochs {corpus.epochs} tokens {tokens / 1e6:.2f}M")
    print(
        f"held-out perplexity {held_out_perplexity(model.eval(), corpus.held_out, 512, device):.2f}"
    )


if __name__ == "__main__":
    main()
