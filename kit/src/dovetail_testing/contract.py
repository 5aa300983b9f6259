"""Provide what all contract classes have in common. A plugin's whole conformance test is a subclass
of its extension point's contract:

    class TestMyScheduler(SchedulerContract):
        provider = PROVIDER

What the provider declares is tested; what it does not declare must be rejected with a reason.
Inputs are random in each run. A failure reports what the contract requires, the smallest failing
input, and common causes.
"""

from __future__ import annotations

import functools
import os
import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pytest
from hypothesis import Phase, given, seed
from hypothesis.strategies import SearchStrategy

from dovetail.assembly.compose import PlanContext
from dovetail.composition.selection import choose
from dovetail.errors import PluginError
from dovetail.facts import LayerKind, ModelFacts, device_facts
from dovetail.plan import Choice, Plan
from dovetail.plugin.build_context import BuildContext
from dovetail.plugin.config import ProviderConfig
from dovetail.plugin.discovery import Offer, PluginInfo, Registry
from dovetail.plugin.extension_points import EXTENSION_POINTS, ExtensionPoint
from dovetail.plugin.provider import Context, KVCacheOptions, Options, Provider, SchedulerOptions
from dovetail_testing.machines import Machine, limits, run_machine, shown

RUN_SEED = int(os.environ.get("DOVETAIL_TEST_SEED") or random.SystemRandom().randrange(2**31))
SCALE = int(os.environ.get("DOVETAIL_SOAK", "1"))
"""Factor on the number of examples that a state machine runs."""

Check = TypeVar("Check", bound=Callable[..., None])
Input = TypeVar("Input")


class Broken(AssertionError):
    """A violation of a contract by a provider. A check raises it with what was found; the decorator
    adds the rest."""

    def __init__(
        self, found: str, *, input: str = "", asks: str = "", causes: str = "", seed: int = RUN_SEED
    ) -> None:
        self.found, self.input, self.asks, self.causes, self.seed = found, input, asks, causes, seed
        super().__init__(found)

    def __str__(self) -> str:
        lines = (
            ("the contract requires", self.asks),
            ("smallest failing input", self.input),
            ("common causes", self.causes),
            ("to reproduce", f"DOVETAIL_TEST_SEED={self.seed}"),
        )
        rows = [f"{what}: {text}" for what, text in lines if text]
        return "\n  ".join([self.found, *(line for row in rows for line in row.splitlines())])


def common_causes(*causes: str) -> Callable[[Check], Check]:
    """Make a method a check of a contract: its docstring is the requirement, and every failure
    becomes a `Broken`."""

    def decorate(check: Check) -> Check:
        asks = " ".join((check.__doc__ or "").split())

        @functools.wraps(check)
        def run(self: Contract, *args: Any, **kwargs: Any) -> None:
            try:
                check(self, *args, **kwargs)
            except Exception as e:
                given = ", ".join([*map(repr, args), *(f"{k}={v!r}" for k, v in kwargs.items())])
                raise completed(e, given, asks, "; ".join(causes), self.seed) from e

        run.contract_check = True  # type: ignore[attr-defined]
        return run  # type: ignore[return-value]

    return decorate


def completed(error: Exception, given: str, asks: str, causes: str, seed: int) -> Broken:
    """Convert an error that ended a check to the form that is reported."""
    if isinstance(error, Broken):
        found, input = error.found, error.input
    else:  # an assertion is the check's own message; any other error comes from the provider
        found = (
            str(error)
            if isinstance(error, AssertionError)
            else f"the provider raised {type(error).__name__}: {error}"
        )
        input = ""
    example = "\n".join(getattr(error, "__notes__", ()))  # hypothesis adds the example as notes
    example = re.sub(
        r"  # or any other.*|^ *# The test always.*\n|^Failing test case: ", "", example, flags=re.M
    )
    input = input or example or given or "none; the provider as declared and built"
    return Broken(found or "an assertion failed", input=input, asks=asks, causes=causes, seed=seed)


class Contract:
    """Base of all contract classes. A class that sets `extension_point` is a contract; any other
    subclass is a plugin's test of one.

    A check cannot be overridden, but it can be expected to fail.
    """

    extension_point: ClassVar[str]
    provider: ClassVar[Provider[Any]]
    device: ClassVar[str] = "cpu"
    options: ClassVar[dict[str, Any]] = {}
    version: ClassVar[str] = ""
    """Contract version that the provider was written for, if it is not the current one."""
    inner: ClassVar[dict[str, Provider[Any]]] = {}
    """Providers for the extension points that the plugin itself adds, by extension point."""
    added: ClassVar[tuple[ExtensionPoint, ...]] = ()
    """Extension points added by plugins that the contract needs."""
    expected_failures: ClassVar[dict[str, str]] = {}
    """Reason why this provider does not pass a check yet, by name of the check. It is a failure if
    such a check passes."""
    seed: ClassVar[int] = RUN_SEED

    def __init_subclass__(cls) -> None:
        if "extension_point" in vars(cls):
            for name, check in vars(cls).items():
                if name.startswith("test_") and not (
                    hasattr(check, "contract_check") and check.__doc__
                ):
                    raise TypeError(
                        f"{cls.__name__}.{name} needs a docstring (what the contract requires) and"
                        " @common_causes"
                    )
            return
        contracts = [
            base for base in cls.__mro__ if "extension_point" in vars(base) or base is Contract
        ]
        fixed = {
            n
            for base in contracts
            for n, v in vars(base).items()
            if callable(v) and not n.startswith("__")
        }
        if overridden := sorted(fixed & set(vars(cls))):
            raise TypeError(
                f"{cls.__name__} overrides {', '.join(overridden)} of the contract: use"
                " expected_failures"
            )
        if unknown := sorted(set(cls.expected_failures) - fixed):
            raise TypeError(
                f"{cls.__name__} expects failures of checks that the contract does not have:"
                f" {', '.join(unknown)}"
            )

    @pytest.fixture(autouse=True)
    def _prepared(self, request: pytest.FixtureRequest) -> None:
        if reason := self.expected_failures.get(getattr(request.node, "originalname", "")):
            request.applymarker(pytest.mark.xfail(reason=reason, strict=True))
        try:
            self.prepare()
        except Exception as e:
            raise completed(
                e,
                str(self.options),
                BUILDS,
                "a missing import or device",
                self.seed,
            ) from e

    def prepare(self) -> None:
        """Prepare a check. Called before each one, for contracts whose checks share an object."""

    # Building the provider under test.

    def settled_options(self, model: ModelFacts | None = None) -> Options:
        """Return the options under test, resolved as in a plan."""
        given = self.provider.options.model_validate(self.options)
        return self.provider.resolve_options(
            replace(self.selection_context(), model=model or KIT_MODEL), given
        )[0]

    def build(self, context: BuildContext | None = None) -> Any:
        context = context or self.build_context()
        built = self.provider.build(context, self.settled_options(context.model))
        return self.registry().extension_points[self.extension_point].adapted(self.version, built)

    def build_context(self, **changes: Any) -> BuildContext:
        """Return the context that the core passes to `build`, for a made-up tiny model. `changes`
        are fields of `BuildContext` except `plan`."""
        defaults: dict[str, type[Options]] = {
            "kv_cache": KVCacheOptions,
            "scheduler": SchedulerOptions,
        }
        options = {key: kind.model_validate({}) for key, kind in defaults.items()}
        options[self.extension_point] = self.settled_options(changes.get("model"))
        options |= {name: provider.options() for name, provider in self.inner.items()}
        names = {name: provider.name for name, provider in self.inner.items()}
        choices = {
            key: Choice(
                extension_point=key,
                requested="auto",
                provider=names.get(key, self.provider.name),
                distribution=DISTRIBUTION,
                version="0",
                contract=self.registry().extension_points[key].contract,
                options=value.model_dump(mode="json"),
            )
            for key, value in options.items()
        }
        plan = Plan(
            model="kit",
            served_model_name="kit",
            folder=str(KIT_MODEL.folder),
            device=self.device,
            dtype="float32",
            max_model_len=KIT_MODEL.max_position_embeddings,
            layer_kinds=["full"],
            choices=choices,
            overlap=False,
            max_num_waiting=1024,
            trust_remote_code=False,
            architecture=KIT_MODEL.architecture,
        )
        return replace(PlanContext(plan, self.registry(), device_facts(), KIT_MODEL), **changes)

    # What is declared, and what is rejected.

    def registry(self) -> Registry:
        """Return a registry with only the provider under test and those in `inner`."""
        plugin = PluginInfo("under-test", DISTRIBUTION, "0", "", "under_test")
        offers = [
            Offer(self.extension_point, self.provider, plugin),
            *(Offer(s, p, plugin) for s, p in self.inner.items()),
        ]
        added = {
            name: ExtensionPoint(name, f"dovetail_{name}", "", within=self.extension_point)
            for name in self.inner
        }
        extension_points = added | {s.name: s for s in (*EXTENSION_POINTS, *self.added)}
        return Registry([plugin], extension_points, offers=offers)

    def selection_context(self, dtype: str = "float32", **needs: Any) -> Context:
        return Context(device_facts(), KIT_MODEL, self.device, dtype, needs)

    def refusal(self, context: Context) -> str | None:
        """Return the reason why the core rejects this provider if it is requested by name, or
        None."""
        try:
            choose(
                self.registry(),
                self.extension_point,
                ProviderConfig(use=self.provider.name, options=dict(self.options)),
                context,
            )
        except PluginError as e:
            return e.message
        return None

    def needs(self, declared: object, what: str, context: Context) -> None:
        """Continue a check if `what` is declared. If it is not, require that the core rejects it
        with a reason, and skip the rest of the check."""
        refusal = self.refusal(context)
        if declared:
            assert refusal is None, f"{what} is declared but rejected: {refusal}"
            return
        assert refusal is not None, f"{what} is not declared, but is not rejected"
        pytest.skip(f"{what} is not declared, and is rejected: {refusal}")

    # Finding failures and reducing their inputs.

    def run_machine(self, new: Callable[[], Machine], *, examples: int, steps: int = 40) -> None:
        """Run a state machine. A failure reports the shortest failing sequence of operations."""
        found = run_machine(new, self.seed, examples=examples * SCALE, steps=steps)
        if found is not None:
            error, calls = found
            raise Broken(
                completed(error, "", "", "", self.seed).found, input=shown(calls)
            ) from error

    def run_examples(
        self, test: Callable[..., None], *, examples: int, **strategies: SearchStrategy[Any]
    ) -> None:
        """Call `test` with examples generated by hypothesis. A failure reports the simplest failing
        example."""
        phases = (Phase.generate, Phase.shrink)  # without explain, which traces every line
        seed(self.seed)(limits(examples * SCALE, phases=phases)(given(**strategies)(test)))()

    def attempt(
        self,
        given: Input,
        attempt: Callable[[Input], None],
        simpler: Callable[[Input], list[Input]],
        limit: int = 60,
    ) -> None:
        """Call `attempt(given)`. If it fails, report the simplest failing input, found greedily in
        `limit` attempts."""
        error = failure_of(attempt, given)
        if error is None:
            return
        smallest, candidates = given, simpler(given)
        while candidates and limit:
            candidate, limit = candidates.pop(0), limit - 1
            if smaller_error := failure_of(attempt, candidate):
                smallest, error, candidates = candidate, smaller_error, simpler(candidate)
        shown = completed(error, str(smallest), "", "", self.seed)
        raise Broken(shown.found, input=str(smallest)) from error


def failure_of(attempt: Callable[[Input], None], given: Input) -> Exception | None:
    try:
        attempt(given)
    except Exception as e:
        return e
    return None


DISTRIBUTION = "under-test"
BUILDS = (
    "With the options under test, `build` returns the object that its extension point requires."
)
KIT_MODEL = ModelFacts(
    folder=Path("kit-model"),
    architecture="KitForCausalLM",
    model_type="kit",
    dtype="float32",
    num_layers=1,
    hidden_size=128,
    num_heads=2,
    num_kv_heads=2,
    head_size=64,
    vocab_size=64,
    max_position_embeddings=4096,
    layer_kinds=(LayerKind("full", None),),
    logit_soft_cap=None,
    eos_token_ids=(),
    has_sinks=False,
)
"""The model for which a provider under test is selected, if no real model is involved."""
