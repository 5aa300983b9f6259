"""Run a step on an attention backend, starting from a poisoned cache, and compare it with the
reference. The checks are in attention.py."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, cast

from dovetail.interfaces.attention import AttentionBackend, AttentionCapabilities
from dovetail.interfaces.compiled import CompiledAttention
from dovetail.plugin.provider import Context
from dovetail_testing.attention_steps import Step, StepSpec, plain, simpler
from dovetail_testing.compiled import operands, run_operations
from dovetail_testing.contract import Broken, Contract

if TYPE_CHECKING:
    from torch import Tensor

DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "int8")
FEATURES = ("sliding_window", "logit_soft_cap", "sinks", "batch_invariant")


class AttentionTrial(Contract):
    """Helper methods for the checks of `AttentionContract`."""

    extension_point = "attention"
    built: ClassVar[AttentionBackend]
    backend: AttentionBackend

    def prepare(self) -> None:
        cls = type(self)
        if "built" not in vars(cls):  # one object per engine: the checks share it, as steps do
            cls.built = self.build()
        self.backend = cls.built

    @property
    def can(self) -> AttentionCapabilities:
        can = self.provider.capabilities
        assert isinstance(can, AttentionCapabilities), (
            "the capabilities of an attention provider must be AttentionCapabilities"
        )
        return can

    def check(self, spec: StepSpec) -> None:
        """Run a step, and reduce it if it fails."""
        self.attempt(spec, self.once, partial(simpler, self.can))

    def once(self, spec: StepSpec) -> None:
        """Run a step from a poisoned cache. The output must equal the reference, and the cache must
        be unchanged except for the step's slots."""
        step = Step(spec, self.device)
        out, cache = self.run(step)
        self.compare(step, out)
        exported = self.backend.export_kv(cache, list(range(step.num_blocks)))
        for got, after, what in zip(exported, step.after, ("keys", "values"), strict=True):
            if not same(got.cpu(), after):
                slots = differing_slots(got.cpu(), after)
                mine = [s for s in slots if s in step.slots]
                wrong = (
                    f"slot {mine[0]} lacks its token's {what}"
                    if mine
                    else f"{what} of slot {slots[0]} were changed"
                )
                raise Broken(
                    f"run must write the step's slots and no others: {wrong}", input=str(spec)
                )

    def compiled_once(self, spec: StepSpec) -> None:
        import torch

        step, backend = Step(spec, self.device), cast(CompiledAttention, self.backend)
        expected, expected_cache = self.run(step)
        cache, plan = (
            self.fill(step),
            backend.plan(step.batch(), [step.layer], step.spec.block_size),
        )
        call, out = operands(step)
        compiled = backend.compile(step.layer, cache, call)
        run_operations(
            compiled.ops,
            {step.layer.index: backend.address(step.layer, plan)},
            len(step.q),
            spec.seed,
        )
        assert torch.equal(out, expected), "compiled operations and run have different outputs"
        blocks = list(range(step.num_blocks))
        for compiled_kv, expected_kv in zip(
            backend.export_kv(cache, blocks), backend.export_kv(expected_cache, blocks), strict=True
        ):
            assert same(compiled_kv, expected_kv), (
                "compiled operations and run leave different caches"
            )

    def run(self, step: Step) -> tuple[Tensor, Any]:
        """Fill a cache, plan, run one layer; return the output and the cache."""
        cache, out = self.fill(step), self.new_out(step)
        plan = self.backend.plan(step.batch(), [step.layer], step.spec.block_size)
        self.backend.run(step.layer, step.q, step.k, step.v, cache, plan, out)
        return out.cpu(), cache

    def fill(self, step: Step) -> Any:
        cache = self.backend.allocate_cache(step.cache_spec)
        keys, values = step.before.to(self.device)
        self.backend.import_kv(cache, list(range(step.num_blocks)), keys, values)
        return cache

    def new_out(self, step: Step) -> Tensor:
        """Return an output full of NaN, so that an element that is not written is detected."""
        return step.q.new_full(step.q.shape, float("nan"))

    def compare(self, step: Step, out: Tensor, when: str = "") -> None:
        import torch

        got, (expected, allowed) = out.cpu().double(), step.expected()
        wrong = ~((got - expected).abs() <= allowed)  # NaN is wrong
        if not wrong.any():
            return
        token, head, d = (int(i) for i in wrong.nonzero()[0])
        row = next(b for b, end in enumerate(step.batch().host_query_start[1:]) if token < end)
        why = (
            "NaN: a slot outside the row's sequence and window was read, or an element was not"
            " written"
            if torch.isnan(got[token, head]).any()
            else (
                f"{got[token, head, d]:.7g} instead of {expected[token, head, d]:.7g} ±"
                f" {allowed[token, head, d]:.1g}"
            )
        )
        raise Broken(
            "out must be softmax(scale · q·k) v over the row's own visible"
            f" tokens{when and ' '}{when}: row {row}, token {token}, head {head} has {why};"
            f" {int(wrong.any(-1).sum())} of {wrong[..., 0].numel()} (token, head) pairs are wrong",
            input=str(step.spec),
        )

    def transplant(self, source: Step, spec: StepSpec, place: int) -> Step:
        """Return a step of `spec` whose row `place` continues the source's only sequence, with the
        source's layer."""
        step = Step(spec, self.device)
        row = spec.rows[place]
        step.layer = source.layer
        step.keys[place], step.values[place] = (
            source.keys[0][: row.seq_len],
            source.values[0][: row.seq_len],
        )
        step.queries[place] = source.queries[0][row.num_computed : row.seq_len]
        return step.rebuilt()

    def needs_feature(self, name: str) -> None:
        self.needs(getattr(self.can, name), name, self.asking(**{name: True}))

    def asking(self, dtype: str | None = None, /, **needs: Any) -> Context:
        """Return the context of an ordinary layer with the given requirements."""
        usual = plain(self.can)
        ordinary = {
            "head_size": usual.head_size,
            "block_size": usual.block_size,
            "kv_dtype": usual.kv_dtype,
        }
        return self.selection_context(dtype or usual.dtype, **{**ordinary, **needs})

    def contexts(self, *, declared: bool) -> list[Context]:
        """Return a context for each single requirement that is declared, or that is not."""
        can = self.can
        out = [self.asking(**{f: True}) for f in FEATURES if getattr(can, f) == declared]
        if declared:
            out += [self.asking(d) for d in can.dtypes] + [
                self.asking(kv_dtype=d) for d in can.kv_dtypes
            ]
            out += [self.asking(head_size=n) for n in can.head_sizes or ()]
            return out + [self.asking(block_size=n) for n in can.block_sizes or ()]
        out += [self.asking(d) for d in DTYPES if d not in can.dtypes]
        out += [self.asking(kv_dtype=d) for d in DTYPES if d not in can.kv_dtypes]
        out += [
            self.asking(head_size=n)
            for n in range(1, 300)
            if can.head_sizes and n not in can.head_sizes
        ]
        out += [
            self.asking(block_size=n)
            for n in range(1, 300)
            if can.block_sizes and n not in can.block_sizes
        ]
        return [*out, replace(self.asking(), device_name="nowhere:0")]


def same(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are equal, with NaN equal to itself."""
    return a.dtype == b.dtype and a.shape == b.shape and not bool(_differ(a, b).any())


def _differ(a: Tensor, b: Tensor) -> Tensor:
    a, b = a.double(), b.double()  # torch cannot compare float8
    return ~((a == b) | ((a != a) & (b != b)))


def differing_slots(a: Tensor, b: Tensor) -> list[int]:
    slots: list[int] = _differ(a, b).flatten(0, 1).flatten(1).any(-1).nonzero().flatten().tolist()
    return slots
