"""The contract of the attention socket, as tests. A plugin's test is a subclass:

    class TestMyAttention(AttentionContract):
        provider = PROVIDER
        device = "cuda:0"

What is tried follows from the provider's declared capabilities. Random steps are fresh in each run; a failure names the
seed, and `DOVETAIL_TEST_SEED=<seed>` brings the run back.
"""

from __future__ import annotations

import itertools
import os
import random
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, cast

import pytest

from dovetail.facts import DeviceFacts, device_facts
from dovetail.interfaces.attention import AttentionBackend, AttentionCapabilities
from dovetail.interfaces.compiled import CompiledAttention
from dovetail.provider import Provider
from dovetail.testing.attention_steps import Row, Step, StepSpec, block_sizes, head_sizes, plain, random_spec
from dovetail.testing.compiled import operands, run_operations

if TYPE_CHECKING:
    from torch import Tensor

RUN_SEED = int(os.environ.get("DOVETAIL_TEST_SEED") or random.SystemRandom().randrange(2**31))
NUM_RANDOM_STEPS = 40


@dataclass(frozen=True)
class KitPlan:
    device: str


@dataclass(frozen=True)
class KitContext:
    """Stands in for the core's `BuildContext`: what an attention provider may ask for in its `build`."""

    plan: KitPlan
    device: DeviceFacts = field(default_factory=device_facts)


class AttentionContract:
    """Subclass, set `provider`, and pytest does the rest. A check cannot be overridden; it can be expected to fail."""

    provider: ClassVar[Provider[Any]]
    device: ClassVar[str] = "cpu"
    options: ClassVar[dict[str, Any]] = {}
    expected_failures: ClassVar[dict[str, str]] = {}
    """By name of a check: the reason why this provider does not pass it yet. One that passes after all fails."""

    def __init_subclass__(cls) -> None:
        if overridden := sorted(n for n in vars(cls) if n.startswith("test_") and hasattr(AttentionContract, n)):
            raise TypeError(f"{cls.__name__} overrides {', '.join(overridden)} of the contract: use expected_failures")
        if unknown := sorted(set(cls.expected_failures) - set(dir(AttentionContract))):
            raise TypeError(f"{cls.__name__} expects checks to fail that the contract does not have: {', '.join(unknown)}")

    @pytest.fixture(autouse=True)
    def _backend(self, request: pytest.FixtureRequest) -> None:
        name = request.node.originalname
        if reason := self.expected_failures.get(name):
            request.applymarker(pytest.mark.xfail(reason=reason, strict=True))
        cls = type(self)
        if "built" not in vars(cls):  # one object an engine: the checks share it, as steps do
            options = cls.provider.options.model_validate(cls.options)
            cls.built = cls.provider.build(KitContext(KitPlan(cls.device)), options)  # type: ignore[arg-type]
        self.backend = cls.built

    built: ClassVar[AttentionBackend]
    backend: AttentionBackend

    @property
    def can(self) -> AttentionCapabilities:
        can = self.provider.capabilities
        assert isinstance(can, AttentionCapabilities), "a provider of attention declares an AttentionCapabilities"
        return can

    # The declaration.

    def test_declaration(self) -> None:
        can = self.can
        assert can.framework == "torch", "this kit's tensors are torch's"
        assert self.device.split(":")[0] in can.devices, f"the device under test, {self.device}, must be declared"
        assert can.dtypes, "at least one dtype must be declared"
        assert can.kv_dtypes, "at least one KV dtype must be declared"
        assert self.backend.contract == self.provider.contract, "the backend and its provider state one contract version"

    # What comes out, over all that is declared.

    @pytest.mark.parametrize("index", range(NUM_RANDOM_STEPS))
    def test_random_step(self, index: int) -> None:
        self.check(random_spec(self.can, RUN_SEED + index))

    def test_every_declared_size_and_type(self) -> None:
        rows = (Row(0, 37), Row(300, 1), Row(17, 20))
        usual = plain(self.can, *rows, seed=RUN_SEED)
        specs = [replace(usual, head_size=n) for n in head_sizes(self.can)]
        specs += [replace(usual, block_size=n) for n in block_sizes(self.can)]
        specs += [replace(usual, dtype=d, kv_dtype=kv) for d in self.can.dtypes for kv in self.can.kv_dtypes]
        for spec in specs:
            self.check(spec)

    @pytest.mark.parametrize("group", [1, 2, 5, 8, 16])
    def test_query_heads_share_kv_heads(self, group: int) -> None:
        self.check(plain(self.can, Row(0, 50), Row(90, 1), Row(90, 3), num_heads=2 * group, seed=RUN_SEED))

    def test_long_context_of_few_rows(self) -> None:
        """Where a kernel splits a sequence's keys over workers."""
        for rows in ((Row(2999, 1),), (Row(4095, 1), Row(10, 1)), (Row(2500, 30),)):
            self.check(plain(self.can, *rows, num_heads=2, num_kv_heads=1, seed=RUN_SEED))

    def test_many_rows(self) -> None:
        self.check(plain(self.can, *(Row(n, 1) for n in range(70)), seed=RUN_SEED))

    def test_single_token(self) -> None:
        self.check(plain(self.can, Row(0, 1), seed=RUN_SEED))

    @pytest.mark.parametrize("window", [1, 2, 16, 17, 100, 10_000])
    def test_sliding_window(self, window: int) -> None:
        self.needs("sliding_window")
        self.check(plain(self.can, Row(0, 130), Row(700, 1), Row(301, 40), Row(3, 1), window=window, seed=RUN_SEED))

    @pytest.mark.parametrize("cap", [1.0, 30.0])
    def test_logit_soft_cap(self, cap: float) -> None:
        self.needs("logit_soft_cap")
        self.check(plain(self.can, Row(0, 70), Row(200, 1), logit_soft_cap=cap, scale=1.0, seed=RUN_SEED))

    def test_sinks(self) -> None:
        self.needs("sinks")
        self.check(plain(self.can, Row(0, 70), Row(200, 1), Row(0, 1), sinks=True, seed=RUN_SEED))

    def test_large_logits(self) -> None:
        """The softmax subtracts its maximum: logits of some hundreds neither overflow nor lose all but infinity."""
        self.check(plain(self.can, Row(0, 70), Row(600, 1), scale=20.0, seed=RUN_SEED))

    # Order within a step, and between steps.

    def test_rows_of_a_step_share_blocks(self) -> None:
        """Rows read blocks that another row of the same step writes: all is written before any is read."""
        size = plain(self.can).block_size
        lender = Row(size // 2, 5 * size)
        borrowers = [Row(n * size + extra, 1 + extra, shares=(0, n * size)) for n in (1, 3, 5) for extra in (0, 3)]
        self.check(plain(self.can, lender, *borrowers, seed=RUN_SEED))

    def test_two_plans_live_side_by_side(self) -> None:
        """A plan is good until the next one of the same KV group; another group's does not end it."""
        first = Step(plain(self.can, Row(0, 60), Row(500, 1), seed=RUN_SEED), self.device)
        window = 50 if self.can.sliding_window else None
        second = Step(plain(self.can, Row(0, 20), Row(2000, 1), num_heads=8, window=window, seed=RUN_SEED + 1), self.device)
        caches = [self.fill(s) for s in (first, second)]
        plans = [self.backend.plan(s.batch(), [s.layer], s.spec.block_size) for s in (first, second)]
        for step, cache, plan in zip((first, second), caches, plans, strict=True):
            out = self.new_out(step)
            self.backend.run(step.layer, step.q, step.k, step.v, cache, plan, out)
            self.compare(step, out, "with another group's plan made in between")

    def test_one_plan_serves_all_layers(self) -> None:
        """Layers of a group differ in scale, soft cap and sinks."""
        base = plain(self.can, Row(0, 40), Row(200, 1), seed=RUN_SEED)
        others = [replace(base, scale=0.5)]
        if self.can.logit_soft_cap:
            others.append(replace(base, logit_soft_cap=3.0))
        if self.can.sinks:
            others.append(replace(base, sinks=True))
        steps = [Step(s, self.device) for s in (base, *others)]
        layers = [replace(s.layer, index=i) for i, s in enumerate(steps)]
        plan = self.backend.plan(steps[0].batch(), layers, base.block_size)
        for step, layer in zip(steps, layers, strict=True):
            cache, out = self.fill(step), self.new_out(step)
            self.backend.run(layer, step.q, step.k, step.v, cache, plan, out)
            self.compare(step, out, f"in layer {layer.index} of the plan")

    # Sameness.

    def test_deterministic(self) -> None:
        import torch

        for i in range(3):
            step = Step(random_spec(self.can, RUN_SEED + 1000 + i), self.device)
            first, second = self.run(step)[0], self.run(step)[0]
            assert torch.equal(first, second), f"the same step gave two results\n{self.repeat(step.spec)}"

    @pytest.mark.parametrize("index", range(6))
    def test_batch_invariance(self, index: int) -> None:
        """A token's output has the same bits alone, among neighbours, and however its prompt was cut."""
        import torch

        self.needs("batch_invariant")
        rng = random.Random(RUN_SEED + index)
        spec = replace(random_spec(self.can, RUN_SEED + 2000 + index), rows=(Row(0, rng.randint(300, 1500)),))
        whole = Step(spec, self.device)
        out = self.run(whole)[0]
        length = spec.rows[0].seq_len
        cuts = sorted({0, *rng.sample(range(1, length), 4), length - 1, length})
        neighbours = (Row(0, 33), Row(900, 1), Row(10, 7))
        for begin, end in itertools.pairwise(cuts):
            place = rng.randint(0, len(neighbours))
            rows = [*neighbours[:place], Row(begin, end - begin), *neighbours[place:]]
            part = self.transplant(whole, replace(spec, rows=tuple(rows), seed=spec.seed + 1), place)
            start = sum(r.num_new for r in rows[:place])
            same = torch.equal(self.run(part)[0][start : start + end - begin], out[begin:end])
            assert same, (
                f"batch_invariant is declared, and tokens {begin} to {end - 1} of {length} came out different in a batch "
                f"with other rows than in one prefill\n{self.repeat(part.spec)}"
            )

    @pytest.mark.parametrize("index", range(8))
    def test_compiled_steps_do_what_run_does(self, index: int) -> None:
        """The operations give the bits of `run`, whatever the order of an operation's pieces and whoever does them; q, k
        and v lie side by side in one buffer, as they leave a fused projection."""
        import torch

        self.needs("compiled_steps")
        backend = cast(CompiledAttention, self.backend)
        step = Step(random_spec(self.can, RUN_SEED + 3000 + index), self.device)
        expected, expected_cache = self.run(step)
        cache, plan = self.fill(step), backend.plan(step.batch(), [step.layer], step.spec.block_size)
        call, out = operands(step)
        compiled = backend.compile(step.layer, cache, call)
        run_operations(compiled.ops, {step.layer.index: backend.address(step.layer, plan)}, len(step.q), RUN_SEED + index)
        assert torch.equal(out, expected), f"compiled operations and run differ\n{self.repeat(step.spec)}"
        blocks = list(range(step.num_blocks))
        for ours, theirs in zip(backend.export_kv(cache, blocks), backend.export_kv(expected_cache, blocks), strict=True):
            assert _same(ours, theirs), f"compiled operations and run leave different caches\n{self.repeat(step.spec)}"

    # The cache.

    def test_export_and_import(self) -> None:
        """Both are in the canonical layout `[blocks, block_size, Hkv, D]`, in the order asked for, and lose nothing."""
        for kv_dtype in self.can.kv_dtypes:
            step = Step(plain(self.can, Row(20, 50), kv_dtype=kv_dtype, seed=RUN_SEED), self.device)
            cache = self.fill(step)
            wanted = [step.blocks[0][1], step.poison, step.blocks[0][0]]
            keys, values = self.backend.export_kv(cache, wanted)
            for got, truth, what in ((keys, step.before[0], "keys"), (values, step.before[1], "values")):
                assert tuple(got.shape) == (3, *truth.shape[1:]), f"exported {what} must be [blocks, block_size, Hkv, D]"
                assert _same(got.cpu(), truth[wanted]), f"exported {what} differ from what was imported ({kv_dtype})"
            moved = [wanted[1], wanted[0]]
            self.backend.import_kv(cache, moved, keys[:2], values[:2])
            again, _ = self.backend.export_kv(cache, wanted)
            assert _same(again.cpu(), keys.cpu()[[1, 0, 2]]), "import_kv must write these blocks and no other"

    # How a step is tried.

    def check(self, spec: StepSpec) -> None:
        """Run a step from a poisoned cache: the output is the oracle's, and the cache what it was but for the step's slots."""
        step = Step(spec, self.device)
        out, cache = self.run(step)
        self.compare(step, out)
        exported = self.backend.export_kv(cache, list(range(step.num_blocks)))
        for got, after, what in zip(exported, step.after, ("keys", "values"), strict=True):
            if not _same(got.cpu(), after):
                slots = _differing_slots(got.cpu(), after)
                mine = [s for s in slots if s in step.slots]
                wrong = f"slot {mine[0]} lacks its token's {what}" if mine else f"{what} of slot {slots[0]} were changed"
                pytest.fail(f"run must write the step's slots, and no other: {wrong}\n{self.repeat(spec)}")

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
        """NaN, so that an element that is never written shows."""
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
            "NaN: a slot outside the row's sequence and window was read, or an element was not written"
            if torch.isnan(got[token, head]).any()
            else f"{got[token, head, d]:.7g} instead of {expected[token, head, d]:.7g} ± {allowed[token, head, d]:.1g}"
        )
        pytest.fail(
            f"out must be softmax(scale · q·k) v over the row's own visible tokens {when}: row {row}, token {token}, "
            f"head {head} has {why}; {int(wrong.any(-1).sum())} of {wrong[..., 0].numel()} (token, head) pairs are wrong\n"
            f"{self.repeat(step.spec)}"
        )

    def transplant(self, source: Step, spec: StepSpec, place: int) -> Step:
        """A step of `spec` whose row `place` continues the source's only sequence, with the source's layer."""
        step = Step(spec, self.device)
        row = spec.rows[place]
        step.layer = source.layer
        step.keys[place], step.values[place] = source.keys[0][: row.seq_len], source.values[0][: row.seq_len]
        step.queries[place] = source.queries[0][row.num_computed : row.seq_len]
        return step.rebuilt()

    def needs(self, capability: str) -> None:
        if not getattr(self.can, capability):
            pytest.skip(f"{self.provider.name} does not declare {capability}")

    def repeat(self, spec: StepSpec) -> str:
        return f"the step: {spec}\nto repeat: DOVETAIL_TEST_SEED={RUN_SEED}"


def _same(a: Tensor, b: Tensor) -> bool:
    """The same numbers, with NaN equal to itself."""
    return a.dtype == b.dtype and a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def _differing_slots(a: Tensor, b: Tensor) -> list[int]:
    differ = ~((a == b) | ((a != a) & (b != b)))
    slots: list[int] = differ.flatten(0, 1).flatten(1).any(-1).nonzero().flatten().tolist()
    return slots
