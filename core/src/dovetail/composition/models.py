"""Find the files of a model by its name: a plugin's model, a local path or a hub id."""

from __future__ import annotations

from pathlib import Path

from dovetail.composition.hub import commit_of, download
from dovetail.composition.selection import choose, find
from dovetail.errors import ConfigError, DovetailError, PluginError
from dovetail.facts import device_facts
from dovetail.interfaces.model import ModelSource
from dovetail.plan import Choice
from dovetail.plugin.config import ProviderConfig
from dovetail.plugin.discovery import Registry, load_registry
from dovetail.plugin.provider import Context


def find_model(
    name: str, *, trust_remote_code: bool = False, revision: str | None = None
) -> ModelSource:
    """Return the files of a plugin's model, a local path or a hub id. A hub id is downloaded at
    `revision` (a branch, a tag or a commit); its code only with `trust_remote_code`. Raises
    `ConfigError`."""
    registry, facts = load_registry(), device_facts()
    context = Context(facts, None, facts.devices[0], "")
    return model_and_choice(name, "model", trust_remote_code, registry, context, revision)[0]


def model_and_choice(
    name: str,
    where: str,
    with_code: bool,
    registry: Registry,
    context: Context,
    revision: str | None = None,
) -> tuple[ModelSource, Choice | None]:
    """Resolve the name of a provider, else a local path, else a hub id. `where` names the setting
    in errors."""
    offers = registry.of("model")
    folder = Path(name).expanduser()
    is_offered = any(name in (o.provider.name, o.qualified_name) for o in offers)
    if revision is not None and (is_offered or folder.is_dir()):
        kind = "is provided by a plugin" if is_offered else "is a local path"
        raise ConfigError(
            f"revision: {revision!r} applies to models on the hub, but {name!r} {kind}: remove it"
        )
    if is_offered:
        choice = choose(registry, "model", ProviderConfig(use=name), context, where)
        offer = find(registry, choice)
        try:
            source = offer.provider.build(None, offer.provider.options())  # type: ignore[arg-type]
        except DovetailError:
            raise
        except Exception as e:
            name = offer.qualified_name
            raise PluginError(
                f"{where}: {name} could not be built: {type(e).__name__}: {e}", provider=name
            ) from e
        if not isinstance(source, ModelSource):
            raise PluginError(
                f"{where}: {offer.qualified_name} built {type(source).__name__}, not a ModelSource"
            )
        return source, choice
    if folder.is_dir():
        return ModelSource(folder.resolve()), None
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        folder = download(name, where, with_code=with_code, revision=revision)
        return ModelSource(folder, revision=commit_of(folder) or revision), None
    names = ", ".join(o.provider.name for o in offers) or "none"
    raise ConfigError(
        f"{where}: {name!r} is neither a model provided by a plugin ({names}), nor a local path,"
        " nor a hub id"
    )
