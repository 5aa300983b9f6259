"""Every extension point, in the order of an engine's life.

Hooks register; objects run. Each hook is called once while an engine is being composed (and by
`dovetail plugins` and `dovetail explain`), by the core, and returns the `Provider`s that a package
offers for one extension point; an empty list means "nothing here". A hook's body may import what is
light; what is heavy (torch, a compiler) is imported inside a provider's `build`. No hook is called
per step or per layer: the loop holds the plain objects that `build` returned.

A package joins in by an entry point in the group `dovetail`, whose value is the module that holds
its hooks:

    [project.entry-points.dovetail]
    my-attention = "my_package"

Each extension point's contract has a version of its own (`extension points.py`); a provider states
the range that it was written for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pluggy

from dovetail.plugin.provider import Provider

if TYPE_CHECKING:
    from dovetail.plugin.extension_points import ExtensionPoint

PROJECT = "dovetail"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


# 1. What is to be served: a name becomes a folder of files, before anything else is chosen.


@hookspec
def dovetail_models() -> list[Provider[Any]]:
    """Offer models by name; `build` returns a `ModelSource`. First, because all later choices ask
    about the model.

    A configured model that is no provider's name is a local folder, or else a hub id.
    """
    return []


# 2. What the model is made of: chosen from its config.json.


@hookspec
def dovetail_quantization() -> list[Provider[Any]]:
    """Offer quantization schemes; `build` returns a `Scheme`. Chosen once for every rule of the
    configuration.

    `capabilities` is a `QuantizationCapabilities`. A checkpoint that is quantized is read by a
    scheme that declares its method; one that is not is quantized on the fly where the configuration
    names a scheme that can.
    """
    return []


@hookspec
def dovetail_matmuls() -> list[Provider[Any]]:
    """Offer products by quantized weights; `build` returns a `Matmul`, which schemes ask for the
    layers they make.

    `capabilities` is a `MatmulCapabilities`. Asked only if a scheme was chosen that needs one.
    """
    return []


@hookspec
def dovetail_architectures() -> list[Provider[Any]]:
    """Offer model code; `build` returns an `Architecture`, which the worker asks for the
    checkpoint's model.

    `capabilities` is an `ArchitectureCapabilities`, which says the architectures that it has code
    for.
    """
    return []


# 3. Who computes. The worker is chosen first; it builds the attention providers that were chosen
# for its layers.


@hookspec
def dovetail_workers() -> list[Provider[Any]]:
    """Offer workers; `build` returns a `Worker`, which loads no weight before its `load` is
    called."""
    return []


@hookspec
def dovetail_attention() -> list[Provider[Any]]:
    """Offer attention; `build` returns an `AttentionBackend`. Chosen once for every kind of layer
    the model has.

    `capabilities` is an `AttentionCapabilities`: the core refuses what it does not declare, before
    `why_not` is asked.
    """
    return []


# 4. Who decides. Both hold no tensor.


@hookspec
def dovetail_kv_caches() -> list[Provider[Any]]:
    """Offer KV-cache managers; `build` is called after the worker has sized its memory and returns
    a `KVCacheManager`."""
    return []


@hookspec
def dovetail_schedulers() -> list[Provider[Any]]:
    """Offer schedulers; `build` returns a `Scheduler` over the KV-cache manager."""
    return []


# 5. What makes it faster without changing what it says. Both can be left out.


@hookspec
def dovetail_prefix_caches() -> list[Provider[Any]]:
    """Offer prefix caches; `build` returns a `PrefixCache`, which the KV-cache manager asks. Built
    before the manager."""
    return []


@hookspec
def dovetail_drafters() -> list[Provider[Any]]:
    """Offer drafters; `build` returns a `Drafter`. `capabilities` is a `DrafterCapabilities`."""
    return []


# 6. Who talks to the world. Only `dovetail serve` asks for one.


@hookspec
def dovetail_servers() -> list[Provider[Any]]:
    """Offer servers; `build` returns a `Server`. It lives in the front-end process, with the
    tokenizer."""
    return []


# 7. Places that a plugin opens to others: a server to routes, a prefix cache to eviction policies.


@hookspec
def dovetail_extension_points() -> list[ExtensionPoint]:
    """Add extension points, each with a hook of its own that other plugins implement like those
    above.

    Asked first, of every plugin. A plugin that implements the hook of an extension point that is
    not always installed marks it `@hookimpl(optionalhook=True)`.
    """
    return []
