"""Versions of contracts, what providers say about each other, and extension points that plugins
add."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
from offers import attention, module_with, registry_of, resolved, why_not

from dovetail.assembly.compose import PlanContext
from dovetail.composition.resolution import resolve
from dovetail.errors import ConfigError, PluginError
from dovetail.facts import device_facts, model_facts
from dovetail.plan import Plan
from dovetail.plugin.config import load_config
from dovetail.plugin.contracts import WrittenFor, parse
from dovetail.plugin.discovery import Registry, installed_plugins, load_registry
from dovetail.plugin.extension_points import ExtensionPoint
from dovetail.plugin.provider import Provider, Relation, TieredCacheOptions
from dovetail_testing.plugin import install

WORKER: Provider[Any] = Provider("w", "", lambda c, o: None)


# Versions.


@pytest.mark.parametrize(
    ("value", "first", "last"),
    [("v0_1", "0.1", "0.1"), ("v0_1:v0_2", "0.1", "0.2"), ("v0_9 : v0_10", "0.9", "0.10")],
)
def test_ranges_are_read(value: str, first: str, last: str) -> None:
    assert parse(value) == WrittenFor(first, last)


@pytest.mark.parametrize("value", ["0.1", "v1", "v0_2:v0_1", "", "v0_1:v0_2:v0_3"])
def test_ranges_that_are_none_are_refused(value: str) -> None:
    with pytest.raises(PluginError, match="contract version"):
        parse(value)


def resolved_for(model: Path, first: str, last: str) -> Plan:
    module = module_with(dovetail_workers=[WORKER], dovetail_attention=[attention("old", 90)])
    plain = module_with(dovetail_attention=[attention("plain")])
    old = registry_of({"attention": WrittenFor(first, last)}, x=module)
    registry = registry_of(y=plain)
    registry.offers += [o for o in old.offers if o.plugin.name == "x"]
    return resolve(load_config(model=str(model), device="cpu"), registry)


def test_this_version_and_the_one_before_are_served(model: Path) -> None:
    for first, last in (("0.2", "0.2"), ("0.1", "0.2"), ("0.1", "0.9"), ("0.2", "1.0")):
        choice = resolved_for(model, first, last).choices["attention.full"]
        assert (choice.provider, choice.contract, choice.remarks) == ("old", "0.2", [])
    choice = resolved_for(model, "0.1", "0.1").choices["attention.full"]
    assert (choice.provider, choice.contract) == ("old", "0.1")
    (remark,) = choice.remarks
    assert remark.startswith("written for contract 0.1 of attention, deprecated since 0.2")
    assert remark.endswith("until 0.3")


@pytest.mark.parametrize(
    ("first", "last", "hint"),
    [("0.0", "0.0", "release of the plugin"), ("0.3", "0.4", "dovetail-core")],
)
def test_other_versions_are_refused_with_the_reason(
    model: Path, first: str, last: str, hint: str
) -> None:
    choice = resolved_for(model, first, last).choices["attention.full"]
    assert choice.provider == "plain"
    (why,) = why_not(choice, "old")
    assert "this core serves 0.2 and 0.1" in why
    assert hint in why


def test_metadata_that_cannot_be_read_is_the_plugins_fault_alone(simulated: Path) -> None:
    install(simulated, "dovetail_testing.plugin", "wrong")
    info = simulated / "dovetail_wrong-0.1.0.dist-info/entry_points.txt"
    info.write_text(info.read_text() + "[dovetail.contracts]\nattention = one\n")
    registry = load_registry()
    assert "contract attention: 'one' is not a range" in registry.broken["dovetail-wrong"]
    assert registry.of("worker")


class OldBackend:
    """Attention as it was in contract 0.1."""

    def plan(self, batch: Any, layers: Any, block_size: int) -> str:
        return "planned"

    def run(self, *args: Any) -> None: ...

    def allocate_cache(self, spec: Any) -> None: ...

    def import_kv(self, *args: Any) -> None: ...

    def export_kv(self, cache: Any, block_ids: list[int]) -> tuple[list[int], list[int]]:
        return [block + cache for block in block_ids], [-block for block in block_ids]


def test_an_object_of_the_version_before_is_adapted(model: Path) -> None:
    old = Provider(
        "old", "", lambda c, o: OldBackend(), capabilities=attention("x").capabilities, priority=9
    )
    module = module_with(dovetail_workers=[WORKER], dovetail_attention=[old])
    registry = registry_of({"attention": WrittenFor("0.1", "0.1")}, x=module)
    plan = resolve(load_config(model=str(model), device="cpu"), registry)
    backend = PlanContext(plan, registry, device_facts(), model_facts(model)).build(
        "attention.full"
    )
    assert backend.plan(None, [], 16) == "planned"
    assert backend.export_kv(10, [1, 2]) == ([11, 12], [-1, -2])
    out = (_Array(), _Array())
    assert backend.export_kv(10, [1, 2], out=out) is out
    assert (out[0].written, out[1].written) == ([11, 12], [-1, -2])


class _Array:
    written: Any = None

    def __setitem__(self, index: Any, value: Any) -> None:
        assert index is ...
        self.written = value


# Relations.


def with_relations(
    name: str, priority: int = 0, **relations: tuple[Relation, ...]
) -> Provider[Any]:
    return Provider(
        name,
        "",
        lambda c, o: None,
        capabilities=attention("x").capabilities,
        priority=priority,
        **relations,
    )  # type: ignore[arg-type]


def registry_with(attention: list[Provider[Any]], workers: list[Provider[Any]]) -> Registry:
    return registry_of(x=module_with(dovetail_workers=workers, dovetail_attention=attention))


def chosen(model: Path, registry: Registry, **values: Any) -> Plan:
    return resolve(load_config(model=str(model), device="cpu", **values), registry)


NOT_W = (Relation("worker", ("w",), "it overwrites its queries"),)


def test_auto_gives_way_to_what_was_asked_for(model: Path) -> None:
    registry = registry_with(
        [with_relations("best", 9, conflicts=NOT_W), with_relations("second", 5)], [WORKER]
    )
    plan = chosen(model, registry, worker="w")
    choice = plan.choices["attention.full"]
    assert choice.provider == "second"
    assert "it overwrites its queries" in why_not(choice, "best")[0]
    with pytest.raises(PluginError, match=r"conflicts with|which conflicts with"):
        chosen(model, registry, worker="w", attention="best")


def test_auto_gives_way_where_nothing_else_is_left(model: Path) -> None:
    other = Provider(
        "other",
        "",
        lambda c, o: None,
        priority=-1,
        requires=(Relation("attention", ("third",), "shapes"),),
    )
    offers = [
        with_relations("best", 9, conflicts=NOT_W),
        with_relations("second", 5, conflicts=NOT_W),
        with_relations("third"),
    ]
    plan = chosen(model, registry_with(offers, [WORKER, other]))
    assert (
        plan.choices["worker"].provider == "other"
        or plan.choices["attention.full"].provider == "third"
    )
    plan = chosen(
        model,
        registry_with(offers[:1], [WORKER, Provider("only", "", lambda c, o: None, priority=-5)]),
    )
    assert (plan.choices["attention.full"].provider, plan.choices["worker"].provider) == (
        "best",
        "only",
    )
    (why,) = why_not(plan.choices["worker"], "w")
    assert (
        why == "attention.full is best, which conflicts with w (worker): it overwrites its queries"
        " (change attention.full)"
    )


def test_what_is_required_must_be_there(model: Path) -> None:
    needs = (Relation("attention", ("paged-9",), "the layout of its cache"),)
    picky = Provider("picky", "", lambda c, o: None, priority=9, requires=needs)
    plan = chosen(model, registry_with([with_relations("plain")], [picky, WORKER]))
    assert plan.choices["worker"].provider == "w"
    assert (
        "requires attention: paged-9, but attention.full is plain"
        in why_not(plan.choices["worker"], "picky")[0]
    )
    plan = chosen(
        model,
        registry_with([with_relations("plain"), with_relations("paged-9")], [picky]),
        worker="picky",
    )
    assert plan.choices["attention.full"].provider == "paged-9"


def test_untested_is_said(model: Path) -> None:
    offer = with_relations("new", untested_with=(Relation("worker", ("*",), "nobody tried"),))
    plan = chosen(model, registry_with([offer], [WORKER]))
    assert plan.choices["worker"].remarks == ["untested with w (worker): nobody tried"]


# Extension points that a plugin adds, those that may stay empty, and those that take many.


class Dressed(NamedTuple):
    """A server by name."""

    topping: str
    extras: dict[str, str]

    def run(self) -> None: ...


def offering_server(**added: Any) -> Registry:
    server = module_with(
        dovetail_extension_points=[
            ExtensionPoint("topping", "dovetail_toppings", "one", within="server"),
            ExtensionPoint("extras", "dovetail_extras", "any number", within="server", many=True),
        ],
        dovetail_servers=[
            Provider("s", "", lambda c, o: Dressed(c.build("topping"), c.build_all("extras")))
        ],
        dovetail_toppings=[Provider("salt", "", lambda c, o: "salt", priority=5)],
        dovetail_workers=[WORKER],
        dovetail_attention=[attention("plain")],
    )
    return registry_of(s=server, other=module_with(**added))


TOPPINGS = [Provider("pepper", "", lambda c, o: "pepper")]
EXTRAS = [Provider(n, "", lambda c, o, n=n: n) for n in ("a", "b", "c")]


def test_an_extension_point_of_a_plugin_is_filled_like_any_other(model: Path) -> None:
    registry = offering_server(dovetail_toppings=TOPPINGS, dovetail_extras=EXTRAS)
    assert not registry.broken

    def built(**values: Any) -> Any:
        plan = resolve(load_config(model=str(model), device="cpu", **values), registry, server=True)
        return PlanContext(
            Plan.decode(plan.encode()), registry, device_facts(), model_facts(model)
        ).build("server")

    assert built() == ("salt", {"a": "a", "b": "b", "c": "c"})
    assert built(server={"use": "s", "topping": "pepper", "extras": ["c", {"use": "a"}]}) == (
        "pepper",
        {"c": "c", "a": "a"},
    )
    with pytest.raises(PluginError, match=r"no provider 'pepr'\. Did you mean 'pepper'"):
        built(server={"topping": "pepr"})
    with pytest.raises(ConfigError, match="a is named more than once"):
        built(server={"extras": ["a", "a"]})
    with pytest.raises(ConfigError, match=r"topping: expected NAME or .* found 3"):
        built(server={"topping": 3})
    with pytest.raises(ConfigError, match="expected one provider, found 2"):
        built(server={"topping": ["salt", "pepper"]})


def test_a_hook_of_an_extension_point_that_is_not_installed_breaks_that_plugin_alone() -> None:
    registry = registry_of(other=module_with(dovetail_toppings=TOPPINGS))
    assert "dovetail_toppings" in registry.broken["dist-other"]


def test_two_extension_points_of_one_name_are_refused() -> None:
    twice = [
        ExtensionPoint("attention", "dovetail_other_attention", "taken"),
        ExtensionPoint("fresh", "dovetail_workers", "taken too"),
    ]
    for extension_point in twice:
        registry = registry_of(other=module_with(dovetail_extension_points=[extension_point]))
        assert "has a name that is already in use" in registry.broken["dist-other"]


def test_an_optional_extension_point_may_stay_empty(model: Path) -> None:
    plan = resolved(model, attention("plain"))
    assert plan.choices["speculation"].is_empty
    drafter = Provider("guess", "", lambda c, o: "guesser", options=_drafter_options())
    module = module_with(
        dovetail_workers=[WORKER],
        dovetail_attention=[attention("plain")],
        dovetail_drafters=[drafter],
    )
    registry = registry_of(x=module)
    choice = resolve(load_config(model=str(model)), registry).choices["speculation"]
    assert choice.is_empty
    assert why_not(choice, "guess") == ["none was requested (set speculation: auto)"]
    taken = resolve(load_config(model=str(model), speculation="auto"), registry).choices[
        "speculation"
    ]
    assert (taken.provider, taken.options) == ("guess", {"num_draft_tokens": 4, "adaptive": True})
    with pytest.raises(ConfigError, match="no provider is selected"):
        resolve(
            load_config(model=str(model), speculation={"use": "none", "num_draft_tokens": 3}),
            registry,
        )
    with pytest.raises(ConfigError, match="num_draft_tokens"):
        resolve(
            load_config(model=str(model), speculation={"use": "guess", "num_draft_tokens": 1000}),
            registry,
        )


def _drafter_options() -> Any:
    from dovetail.plugin.provider import DrafterOptions

    return DrafterOptions


def test_every_installed_plugin_says_what_it_was_written_for() -> None:
    registry = load_registry()
    for offer in registry.offers:
        if offer.plugin.distribution.startswith("dovetail-"):
            assert offer.plugin.written_for(offer.extension_point), (
                f"{offer.qualified_name}: no version of {offer.extension_point}"
            )
    assert installed_plugins()


# A host tier.


def test_a_worker_without_a_host_tier_is_refused_with_the_reason(model: Path) -> None:
    cache: Provider[Any] = Provider("c", "", lambda c, o: None, TieredCacheOptions)
    module = module_with(
        dovetail_workers=[WORKER],
        dovetail_attention=[attention("a")],
        dovetail_prefix_caches=[cache],
    )
    asked = {"prefix_cache": {"use": "c", "host_memory_gb": 1}}
    with pytest.raises(
        PluginError,
        match=r"does not store KV blocks in host memory \(remove prefix_cache.host_memory_gb\)",
    ):
        resolve(load_config(model=str(model), device="cpu", **asked), registry_of(x=module))
    assert resolve(
        load_config(model=str(model), device="cpu", prefix_cache="c"), registry_of(x=module)
    ).choices["worker"]
