"""Compose and drive a worker for its contract. The checks are in worker.py."""

from __future__ import annotations

import math
import random
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from dovetail.assembly.compose import PlanContext
from dovetail.composition.resolution import resolve
from dovetail.facts import device_facts, model_facts
from dovetail.interfaces.drafter import DrafterCapabilities
from dovetail.interfaces.worker import Worker
from dovetail.plan import Plan
from dovetail.plugin.config import EngineConfig
from dovetail.plugin.discovery import Offer, Registry, load_registry
from dovetail.plugin.provider import DraftModelOptions, Provider
from dovetail.types import SamplingParams
from dovetail_testing.contract import DISTRIBUTION, Contract
from dovetail_testing.tiny_model import TinyModel, softmax
from dovetail_testing.worker_driver import GREEDY, Driver

DRAFTER: Provider[object] = Provider(
    "drafts-for-itself",
    "leaves all draft tokens to the worker",
    lambda context, options: None,
    DraftModelOptions,
    DrafterCapabilities(runs_in="worker"),
)
SEATS, BUDGET, BLOCK_SIZE, NUM_BLOCKS = 256, 1024, 16, 700
KV_CACHE = {"block_size": BLOCK_SIZE, "memory_gb": 0.25}


@dataclass(frozen=True)
class Asked:
    """A sequence to generate."""

    prompt: tuple[int, ...]
    temperature: float = 0.0
    seed: int = 0
    index: int = 0
    more: dict[str, Any] = field(default_factory=dict)
    """Additional sampling parameters."""

    @property
    def params(self) -> SamplingParams:
        return replace_params(GREEDY, temperature=self.temperature, **self.more)


class WorkerTrial(Contract):
    """Helper methods for the checks of `WorkerContract`."""

    extension_point = "worker"
    composition: ClassVar[dict[str, Any]] = {}
    """Additional keys of the engine config, such as `attention`."""
    folder: ClassVar[Path]
    model: ClassVar[TinyModel]
    built: ClassVar[Driver]

    def prepare(self) -> None:
        cls = type(self)
        if "folder" not in vars(cls):
            cls.folder, cls.model = Path(tempfile.mkdtemp(prefix="dovetail-")), TinyModel(self.seed)
            cls.model.write(cls.folder / "model")

    @classmethod
    def teardown_class(cls) -> None:
        if "built" in vars(cls):
            cls.built.worker.close()
        if "folder" in vars(cls):
            shutil.rmtree(cls.folder)

    @property
    def driver(self) -> Driver:
        """One worker, which the checks share as requests do."""
        cls = type(self)
        if "built" not in vars(cls):
            cls.built = self.new_driver()
        return cls.built

    def composed(
        self,
        folder: Path,
        *,
        overlap: bool = False,
        drafts: bool = False,
        schemes: tuple[Provider[Any], ...] = (),
        **more: Any,
    ) -> tuple[Plan, Registry]:
        """Resolve an engine config with the worker under test. With `drafts`, the model drafts for
        itself. `schemes` are offered for quantization; `more` are keys of the engine config."""
        registry, own = load_registry(), self.registry()
        registry.plugins.extend(own.plugins)
        registry.offers.extend(own.offers)
        config = {
            "model": str(folder),
            "device": self.device,
            "dtype": "float32",
            "overlap": overlap,
            "worker": {"use": f"{DISTRIBUTION}:{self.provider.name}", **self.options},
            "kv_cache": KV_CACHE,
            "scheduler": {"max_num_seqs": SEATS, "max_num_batched_tokens": BUDGET},
            **self.composition,
        }
        config |= more
        registry.offers.extend(Offer("quantization", scheme, own.plugins[0]) for scheme in schemes)
        if drafts:
            registry.offers.append(Offer("speculation", DRAFTER, own.plugins[0]))
            config["speculation"] = {"use": f"{DISTRIBUTION}:{DRAFTER.name}", "model": str(folder)}
        return resolve(EngineConfig.model_validate(config), registry), registry

    def new_worker(self, folder: Path, **how: Any) -> Worker:
        """Build a worker from a plan that was encoded and decoded, as for the engine process;
        nothing is loaded. `how` has the arguments of `composed`."""
        plan, registry = self.composed(folder, **how)
        plan = Plan.decode(plan.encode())
        worker: Worker = PlanContext(plan, registry, device_facts(), model_facts(folder)).build(
            "worker"
        )
        return worker

    def new_driver(self, folder: Path | None = None, **how: Any) -> Driver:
        worker = self.new_worker(folder or self.folder / "model", **how)
        worker.load(no_progress)
        groups = worker.kv_groups()
        num_blocks = [NUM_BLOCKS] * len(groups)
        worker.allocate(num_blocks)
        worker.warm_up(no_progress)
        return Driver(worker, groups, num_blocks)

    def some(self, length: int, *, temperature: float = 0.0, seed: int = 0) -> Asked:
        rng = random.Random(self.seed + length)
        prompt = tuple(rng.randrange(2, self.model.vocab_size) for _ in range(length))
        return Asked(prompt, temperature, seed)

    def together(self, asked: list[Asked]) -> list[list[int]]:
        ids = [self.driver.add(list(a.prompt), a.params, seed=a.seed, index=a.index) for a in asked]
        outputs = self.driver.generate(ids, 12)
        self.driver.end(ids)
        return outputs

    def alone(self, asked: list[Asked]) -> list[list[int]]:
        """Return the outputs of sequences that each run alone, with 12 tokens."""
        return [self.together([a])[0] for a in asked]

    def same_both_ways(self, generate: Any, how: str, asked: list[Asked]) -> None:
        """Check that `generate(driver, seq_ids, expected)` gives the output that each sequence has
        alone. A failing input is reduced."""

        def attempt(asked: list[Asked]) -> None:
            expected = self.alone(asked)
            ids = [
                self.driver.add(list(a.prompt), a.params, seed=a.seed, index=a.index) for a in asked
            ]
            try:
                got = generate(self.driver, ids, expected)
            finally:
                self.driver.end(ids)
            for a, g, e in zip(asked, got, expected, strict=True):
                assert g == e[: len(g)], (
                    f"{how}, a prompt of {len(a.prompt)} tokens gives {g}, but alone {e}"
                )

        def fewer(asked: list[Asked]) -> list[list[Asked]]:
            out = [asked[:i] + asked[i + 1 :] for i in range(len(asked)) if len(asked) > 1]
            for i, a in enumerate(asked):
                if len(a.prompt) > 1:
                    out.append(
                        [
                            *asked[:i],
                            replace(a, prompt=a.prompt[: len(a.prompt) // 2]),
                            *asked[i + 1 :],
                        ]
                    )
            return out

        self.attempt(asked, attempt, fewer)


def error_of(call: Callable[[], Any]) -> Any:
    """Return the exception that a call raises, or what it returns."""
    try:
        return call()
    except Exception as e:
        return e


def no_progress(what: str, done: int, total: int) -> None:
    """Ignore progress."""


def replace_params(params: SamplingParams, **changes: Any) -> SamplingParams:
    return SamplingParams(
        **{**{f: getattr(params, f) for f in params.__struct_fields__}, **changes}
    )


def temperature_for(logits: list[float], probability: float) -> float:
    """Return the temperature at which the most likely token has this probability."""
    low, high = 0.01, 100.0
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (
            (middle, high)
            if max(softmax([x / middle for x in logits])) > probability
            else (low, middle)
        )
    return low
