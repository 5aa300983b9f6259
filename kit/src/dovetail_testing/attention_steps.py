"""Create steps for tests of attention: random ragged batches over a poisoned cache, and the
expected output.

A step is specified in the terms of the contract (`StepSpec`) and then built (`Step`): the logical
keys and values of every sequence, the canonical cache before the step, with NaN in every slot that
must not be read, and the expected cache and output after it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dovetail.interfaces.attention import (
    AttentionBatch,
    AttentionCapabilities,
    AttentionLayer,
    KVCacheSpec,
)
from dovetail_testing.attention_error import SMALLEST, relative_error

if TYPE_CHECKING:
    from torch import Tensor

LARGEST = {"float8_e4m3fn": 448, "int8": 127}
"""Largest value of each one-byte KV dtype."""
ANY_HEAD_SIZE = (16, 40, 64, 80, 128, 256)
"""Head sizes to test if a provider declares any."""
ANY_BLOCK_SIZE = (1, 8, 16, 24, 32, 128)


@dataclass(frozen=True)
class Row:
    """One sequence's part of a step."""

    num_computed: int
    """Number of tokens whose keys and values are in the cache before the step."""
    num_new: int
    """Number of tokens in the step."""
    shares: tuple[int, int] | None = None
    """(row, n): the first n tokens are in the blocks of that earlier row, which may be written in
    this same step."""

    @property
    def seq_len(self) -> int:
        return self.num_computed + self.num_new


@dataclass(frozen=True)
class StepSpec:
    """A step and its layer; all tensors follow from `seed`."""

    rows: tuple[Row, ...]
    dtype: str = "float32"
    kv_dtype: str = "float32"
    num_heads: int = 4
    num_kv_heads: int = 2
    head_size: int = 64
    block_size: int = 16
    window: int | None = None
    logit_soft_cap: float | None = None
    sinks: bool = False
    scale: float | None = None
    """Scale of the logits; None means 1 / sqrt(head_size)."""
    fused: bool = False
    """q, k and v are views of one tensor, as from a fused projection."""
    canary: bool = False
    """Slots that the step must not access contain distinct numbers instead of NaN."""
    seed: int = 0
    kv_range: tuple[float, float] | None = None
    """For a one-byte KV dtype: the largest keys and values within its scales; None means random."""

    def __str__(self) -> str:
        rows = ", ".join(
            f"{r.num_computed}+{r.num_new}" + (f" sharing {r.shares}" if r.shares else "")
            for r in self.rows
        )
        rest = {k: v for k, v in vars(self).items() if k != "rows" and v not in (None, False)}
        return f"rows [{rows}] (computed+new), " + ", ".join(f"{k}={v}" for k, v in rest.items())


def head_sizes(can: AttentionCapabilities) -> tuple[int, ...]:
    return can.head_sizes or ANY_HEAD_SIZE


def block_sizes(can: AttentionCapabilities) -> tuple[int, ...]:
    return can.block_sizes or ANY_BLOCK_SIZE


def preferred(values: tuple[Any, ...], wanted: Any) -> Any:
    """Return `wanted` if it is declared, otherwise the first declared value."""
    return wanted if wanted in values else values[0]


def plain(can: AttentionCapabilities, *rows: Row, seed: int = 0, **changes: Any) -> StepSpec:
    """Return an ordinary step within the provider's declaration."""
    dtype = preferred(can.dtypes, "float32")
    spec = StepSpec(
        rows,
        dtype,
        preferred(can.kv_dtypes, dtype),
        head_size=preferred(head_sizes(can), 64),
        block_size=preferred(block_sizes(can), 16),
        seed=seed,
    )
    return replace(spec, **changes)


def random_spec(can: AttentionCapabilities, seed: int) -> StepSpec:
    """Return a random step within the provider's declaration: prefill, chunks and decode, sometimes
    with shared blocks."""
    rng = random.Random(seed)
    block_size = rng.choice(block_sizes(can))
    dtype = rng.choice(can.dtypes)
    num_kv_heads = rng.choice((1, 2, 3, 5))
    rows: list[Row] = []
    for _ in range(rng.randint(1, 7)):
        kind = rng.choice(("prefill", "chunk", "decode", "decode"))
        computed = 0 if kind == "prefill" else rng.choice((rng.randint(1, 40), rng.randint(1, 800)))
        rows.append(
            Row(
                computed,
                1 if kind == "decode" else rng.choice((rng.randint(1, 12), rng.randint(1, 150))),
            )
        )
    lender = rng.randrange(len(rows))
    if rows[lender].seq_len > block_size and rng.random() < 0.4:
        shared = rng.randint(1, (rows[lender].seq_len - 1) // block_size) * block_size
        rows.append(Row(shared + rng.randint(0, 20), rng.randint(1, 20), shares=(lender, shared)))
    return StepSpec(
        tuple(rows),
        dtype,
        dtype if dtype in can.kv_dtypes and rng.random() < 0.7 else rng.choice(can.kv_dtypes),
        num_heads=num_kv_heads * rng.choice((1, 2, 3, 4, 7, 8)),
        num_kv_heads=num_kv_heads,
        head_size=rng.choice(head_sizes(can)),
        block_size=block_size,
        window=(
            rng.choice((None, rng.randint(1, 20), rng.randint(1, 600)))
            if can.sliding_window
            else None
        ),
        logit_soft_cap=rng.choice((None, None, 5.0, 50.0)) if can.logit_soft_cap else None,
        sinks=can.sinks and rng.random() < 0.3,
        fused=rng.random() < 0.5,
        canary=rng.random() < 0.3,
        seed=seed,
    )


def simpler(can: AttentionCapabilities, spec: StepSpec) -> list[StepSpec]:
    """Return steps that are simpler in one respect, the greatest reductions first."""
    out = [
        replace(spec, rows=_without(spec.rows, i))
        for i in range(len(spec.rows))
        if len(spec.rows) > 1
    ]
    plain_values: tuple[tuple[str, Any], ...] = (
        ("sinks", False),
        ("logit_soft_cap", None),
        ("window", None),
        ("scale", None),
        ("fused", False),
        ("canary", False),
        ("dtype", preferred(can.dtypes, "float32")),
        ("kv_dtype", preferred(can.kv_dtypes, spec.dtype)),
        ("head_size", min(head_sizes(can))),
        ("block_size", preferred(block_sizes(can), 16)),
    )
    out += [
        replace(spec, **{name: value})
        for name, value in plain_values
        if getattr(spec, name) != value
    ]
    group = spec.num_heads // spec.num_kv_heads
    heads = [
        (group, 1),
        (spec.num_kv_heads, spec.num_kv_heads),
        (2 * spec.num_kv_heads, spec.num_kv_heads),
    ]
    out += [replace(spec, num_heads=h, num_kv_heads=kv) for h, kv in heads if h < spec.num_heads]
    for i, row in enumerate(spec.rows):
        smaller = [replace(row, shares=None)] if row.shares else []
        smaller += [
            replace(row, num_computed=n)
            for n in dict.fromkeys((0, row.num_computed // 2, row.num_computed - 1))
        ]
        smaller += [
            replace(row, num_new=n) for n in dict.fromkeys((1, row.num_new // 2, row.num_new - 1))
        ]
        out += [
            replace(spec, rows=(*spec.rows[:i], r, *spec.rows[i + 1 :]))
            for r in smaller
            if r != row
        ]
    return [s for s in out if _is_possible(s)]


def _without(rows: tuple[Row, ...], gone: int) -> tuple[Row, ...]:
    def moved(row: Row) -> Row:
        if row.shares is None or row.shares[0] < gone:
            return row
        return replace(
            row, shares=None if row.shares[0] == gone else (row.shares[0] - 1, row.shares[1])
        )

    return tuple(moved(r) for i, r in enumerate(rows) if i != gone)


def _is_possible(spec: StepSpec) -> bool:
    """Return whether rows have tokens, and shared tokens are whole blocks that the lender has and
    the borrower does not compute."""
    return all(
        r.num_new >= 1
        and r.num_computed >= 0
        and (
            r.shares is None
            or (
                r.shares[1] <= min(spec.rows[r.shares[0]].seq_len, r.num_computed)
                and r.shares[1] % spec.block_size == 0
            )
        )
        for r in spec.rows
    )


class Step:
    """The tensors of a spec on a device. `blocks[b]` has all block ids of row b, whatever its
    window."""

    def __init__(self, spec: StepSpec, device: str) -> None:
        import torch

        self.spec, self.device = spec, device
        generator = torch.Generator().manual_seed(spec.seed)

        def normal(*shape: int, dtype: str) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float32).to(
                getattr(torch, dtype)
            )

        self.keys: list[Tensor] = []
        """Keys per row `[seq_len, Hkv, D]`, in the model's dtype."""
        self.values: list[Tensor] = []
        queries: list[Tensor] = []
        for row in spec.rows:
            shape = (row.seq_len, spec.num_kv_heads, spec.head_size)
            self.keys.append(normal(*shape, dtype=spec.dtype))
            self.values.append(normal(*shape, dtype=spec.dtype))
            queries.append(normal(row.num_new, spec.num_heads, spec.head_size, dtype=spec.dtype))
            if row.shares:
                lender, n = row.shares
                self.keys[-1][:n], self.values[-1][:n] = (
                    self.keys[lender][:n],
                    self.values[lender][:n],
                )
        self.queries = queries
        sinks = normal(spec.num_heads, dtype="float32").to(device) if spec.sinks else None
        scale = spec.head_size**-0.5 if spec.scale is None else spec.scale
        self.layer = AttentionLayer(
            0,
            spec.num_heads,
            spec.num_kv_heads,
            spec.head_size,
            scale,
            spec.window,
            spec.logit_soft_cap,
            sinks,
            _kv_scales(spec, device),
        )
        self._place_blocks()
        self.rebuilt()

    def rebuilt(self) -> Step:
        """Lay out cache and inputs from the logical tensors; call it again if they are replaced."""
        import torch

        self._fill_cache()
        tensors = (self.queries, self._new(self.keys), self._new(self.values))
        q, k, v = (torch.cat(x).to(self.device) for x in tensors)
        if self.spec.fused:
            fused, heads = torch.cat([q, k, v], dim=1), q.shape[1]
            q, k, v = (
                fused[:, :heads],
                fused[:, heads : heads + k.shape[1]],
                fused[:, heads + k.shape[1] :],
            )
        self.q, self.k, self.v = q, k, v
        return self

    @property
    def cache_spec(self) -> KVCacheSpec:
        s = self.spec
        return KVCacheSpec(self.num_blocks, s.block_size, s.num_kv_heads, s.head_size, s.kv_dtype)

    def _new(self, per_row: list[Tensor]) -> list[Tensor]:
        return [x[row.num_computed :] for row, x in zip(self.spec.rows, per_row, strict=True)]

    def _place_blocks(self) -> None:
        """Assign shuffled block ids. Block 0 and the last two belong to no row: they contain
        poison, and padding points to one of them."""
        size = self.spec.block_size
        needed = [
            -(-r.seq_len // size) - (r.shares[1] // size if r.shares else 0) for r in self.spec.rows
        ]
        self.num_blocks = sum(needed) + 3
        self.poison = self.num_blocks - 1
        ids = list(range(1, self.num_blocks - 2))
        random.Random(self.spec.seed).shuffle(ids)
        self.blocks: list[list[int]] = []
        for row, n in zip(self.spec.rows, needed, strict=True):
            lent = self.blocks[row.shares[0]][: row.shares[1] // size] if row.shares else []
            self.blocks.append(lent + [ids.pop() for _ in range(n)])

    def _visible_from(self, row: Row) -> int:
        """Return the first position that the row's queries attend to."""
        return 0 if self.spec.window is None else max(0, row.num_computed - self.spec.window + 1)

    def slot(self, b: int, position: int) -> int:
        size = self.spec.block_size
        return self.blocks[b][position // size] * size + position % size

    def _stored(self, x: Tensor, which: int) -> Tensor:
        """Return keys (0) or values (1) as stored in the cache."""
        import torch

        dtype, largest = getattr(torch, self.spec.kv_dtype), LARGEST.get(self.spec.kv_dtype)
        if largest is None:
            return x.to(dtype)
        scales = self.layer.kv_scales
        limited = (x.float() / (1.0 if scales is None else scales[which].cpu())).clamp(
            -largest, largest
        )
        return (limited.round() if dtype is torch.int8 else limited).to(dtype)

    def _read(self, x: Tensor, which: int) -> Tensor:
        """Return what stored keys or values represent, in float64."""
        scales = self.layer.kv_scales
        return x.double() * (1.0 if scales is None else scales[which].double().cpu())

    def _fill_cache(self) -> None:
        """Set `before`, which is NaN except for what the rows attend to of earlier steps, and
        `after`, which adds this step's tokens. int8 has no NaN; -128 is used instead, which is
        never stored."""
        import torch

        s = self.spec
        dtype = getattr(torch, s.kv_dtype)
        shape = (2, self.num_blocks * s.block_size, s.num_kv_heads, s.head_size)
        before = (
            torch.full(shape, -128, dtype=dtype)
            if s.kv_dtype == "int8"
            else torch.full(shape, float("nan")).to(dtype)
        )
        if s.canary:  # large enough to affect any sum, exact in every type
            own = torch.arange(shape[1]) % 100
            numbers = (
                (own + 20).to(torch.uint8).view(dtype)
                if s.kv_dtype in LARGEST
                else (1024 + 8 * own).to(dtype)
            )
            before[:] = numbers[:, None, None]
        self.slots = [
            self.slot(b, p) for b, r in enumerate(s.rows) for p in range(r.num_computed, r.seq_len)
        ]
        written = set(self.slots)
        for b, row in enumerate(s.rows):
            for p in range(self._visible_from(row), row.num_computed):
                if (slot := self.slot(b, p)) not in written:
                    before[0, slot], before[1, slot] = (
                        self._stored(self.keys[b][p], 0),
                        self._stored(self.values[b][p], 1),
                    )
        after = before.clone()
        for which, tensors in enumerate((self.keys, self.values)):
            after[which, self.slots] = self._stored(torch.cat(self._new(tensors)), which)
        blocked = (2, self.num_blocks, s.block_size, s.num_kv_heads, s.head_size)
        self.before, self.after = before.view(blocked), after.view(blocked)

    @property
    def table_width(self) -> int:
        return max(len(blocks) for blocks in self.blocks)

    def batch(self, width: int | None = None) -> AttentionBatch:
        """Return the batch as a worker passes it: the table is a view of a wider buffer, and its
        undefined entries are poison."""
        import torch

        s, size = self.spec, self.spec.block_size
        starts = [0]
        for row in s.rows:
            starts.append(starts[-1] + row.num_new)
        lengths = [row.seq_len for row in s.rows]
        width = width or self.table_width + 2
        table = torch.full((len(s.rows) + 1, width + 3), self.poison, dtype=torch.int32)
        for b, row in enumerate(s.rows):
            first = self._visible_from(row) // size
            table[b, first : len(self.blocks[b])] = torch.tensor(
                self.blocks[b][first:], dtype=torch.int32
            )

        def ints(values: list[int], dtype: Any) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=self.device)

        return AttentionBatch(
            ints(starts, torch.int32),
            ints(lengths, torch.int32),
            table.to(self.device)[: len(s.rows), :width],
            ints(self.slots, torch.int64),
            starts,
            lengths,
            len(s.rows),
            starts[-1],
            max(r.num_new for r in s.rows),
            max(lengths),
        )

    def expected(self) -> tuple[Tensor, Tensor]:
        """Return the output `[T, Hq, D]` and the allowed error of each element, both float64, from
        the logical tensors."""
        import torch

        parts = [self._attend(b) for b in range(len(self.spec.rows))]
        return torch.cat([out for out, _ in parts]), torch.cat([error for _, error in parts])

    def _attend(self, b: int) -> tuple[Tensor, Tensor]:
        """Compute softmax(q·k) v of one row as in a textbook, in float64."""
        import torch

        s, row, layer = self.spec, self.spec.rows[b], self.layer
        group = s.num_heads // s.num_kv_heads
        q = self.queries[b].double().transpose(0, 1)  # [Hq, n, D]
        stored = [self._stored(x[b], which) for which, x in enumerate((self.keys, self.values))]
        k, v = (
            self._read(x, which).repeat_interleave(group, 1).transpose(0, 1)
            for which, x in enumerate(stored)
        )
        logits = q @ k.transpose(1, 2) * layer.scale  # [Hq, n, S]
        if s.logit_soft_cap is not None:
            logits = s.logit_soft_cap * torch.tanh(logits / s.logit_soft_cap)
        query_at, key_at = (
            torch.arange(row.num_computed, row.seq_len)[:, None],
            torch.arange(row.seq_len),
        )
        seen = (key_at <= query_at) & (key_at > query_at - (s.window or row.seq_len + 1))
        largest = logits.abs().masked_fill(~seen, 0).amax()
        logits = logits.masked_fill(~seen, float("-inf"))
        if layer.sinks is not None:
            sinks = layer.sinks.double().cpu()[:, None, None].expand(-1, row.num_new, 1)
            logits = torch.cat([logits, sinks], dim=-1)
        weights = torch.softmax(logits, dim=-1)[..., : row.seq_len]
        out = weights @ v
        error = (
            relative_error(s.dtype, s.kv_dtype, float(largest)) * (weights @ v.abs() + out.abs())
            + SMALLEST[s.dtype]
        )
        return out.transpose(0, 1), error.transpose(0, 1)


def _kv_scales(spec: StepSpec, device: str) -> Tensor | None:
    """Return scales for a one-byte KV dtype; sometimes a few numbers are out of range."""
    import torch

    rng = random.Random(spec.seed)
    if spec.kv_dtype in LARGEST and spec.kv_range is not None:
        return torch.tensor(
            [n / LARGEST[spec.kv_dtype] for n in spec.kv_range], dtype=torch.float32, device=device
        )
    if spec.kv_dtype not in LARGEST or (spec.kv_dtype == "float8_e4m3fn" and rng.random() < 0.3):
        return None
    largest = [rng.uniform(1.5, 4.0) for _ in range(2)]
    return torch.tensor(
        [n / LARGEST[spec.kv_dtype] for n in largest], dtype=torch.float32, device=device
    )


def padded(batch: AttentionBatch, count: int) -> AttentionBatch:
    """Return a decode step with `count` padding rows after its own
    (`AttentionCapabilities.graph_capture`)."""
    import torch

    start, table = batch.host_query_start[-1], batch.block_table
    more = torch.arange(start + 1, start + count + 1, dtype=torch.int32, device=table.device)
    ones = torch.ones_like(more)
    return AttentionBatch(
        torch.cat([batch.query_start, more]),
        torch.cat([batch.seq_lens, ones]),
        torch.cat([table, table.new_zeros(count, table.shape[1])]),
        torch.cat([batch.slot_mapping, ones.long() * 0]),
        batch.host_query_start + more.tolist(),
        batch.host_seq_lens + ones.tolist(),
        batch.num_seqs + count,
        batch.num_tokens + count,
        1,
        batch.max_seq_len,
    )
