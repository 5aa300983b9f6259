"""Define the hooks of all extension points, in the order of an engine's life cycle.

Hooks register; objects run. The core calls each hook once while it composes an engine (and for
`dovetail plugins` and `dovetail explain`). A hook returns the `Provider`s that a package offers for
one extension point, or an empty list. A hook may import light modules; heavy ones (torch, a
compiler) are imported inside a provider's `build`. No hook is called per step or per layer: the
loop holds the plain objects that `build` returned.

A package is registered by an entry point in the group `dovetail`, whose value is the module with
its hooks:

    [project.entry-points.dovetail]
    my-attention = "my_package"

The contract of each extension point has its own version (`extension_points.py`); a provider states
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


# 1. What is served: a model name is resolved to a folder of files before anything else is selected.


@hookspec
def dovetail_models() -> list[Provider[Any]]:
    """Offer models by name; `build` returns a `ModelSource`. Called first, because all later
    selections depend on the model.

    A configured model that is not the name of a provider is a local path, or else a hub id.
    """
    return []


# 2. What the model consists of: selected from its config.json.


@hookspec
def dovetail_quantization() -> list[Provider[Any]]:
    """Offer quantization schemes; `build` returns a `Scheme`. A provider is selected for every
    quantization rule of the engine config.

    `capabilities` is a `QuantizationCapabilities`. A quantized checkpoint is read by a scheme that
    declares its method; any other is quantized on the fly if the engine config names a scheme that
    supports this.
    """
    return []


@hookspec
def dovetail_matmuls() -> list[Provider[Any]]:
    """Offer GEMM with quantized weights; `build` returns a `Matmul`, which schemes use for the
    layers that they build.

    `capabilities` is a `MatmulCapabilities`. A provider is selected only if a selected scheme needs
    one.
    """
    return []


@hookspec
def dovetail_architectures() -> list[Provider[Any]]:
    """Offer model code; `build` returns an `Architecture`, with which the worker builds the model
    of the checkpoint.

    `capabilities` is an `ArchitectureCapabilities`, which lists the supported architectures.
    """
    return []


# 3. What computes. The worker is selected first; it builds the attention providers that are
# selected for its layers.


@hookspec
def dovetail_workers() -> list[Provider[Any]]:
    """Offer workers; `build` returns a `Worker`, which loads no weights until its `load` is
    called."""
    return []


@hookspec
def dovetail_attention() -> list[Provider[Any]]:
    """Offer attention; `build` returns an `AttentionBackend`. A provider is selected for every kind
    of layer in the model.

    `capabilities` is an `AttentionCapabilities`. The core rejects a provider that does not declare
    what is needed, before it calls `why_not`.
    """
    return []


# 4. What decides. Neither holds tensors.


@hookspec
def dovetail_kv_caches() -> list[Provider[Any]]:
    """Offer KV-cache managers; `build` returns a `KVCacheManager`. It is called when the worker has
    determined the memory for the cache."""
    return []


@hookspec
def dovetail_schedulers() -> list[Provider[Any]]:
    """Offer schedulers; `build` returns a `Scheduler`, which uses the KV-cache manager."""
    return []


# 5. What increases speed without changing outputs. Both are optional.


@hookspec
def dovetail_prefix_caches() -> list[Provider[Any]]:
    """Offer prefix caches; `build` returns a `PrefixCache`, which the KV-cache manager uses. It is
    built before the manager."""
    return []


@hookspec
def dovetail_drafters() -> list[Provider[Any]]:
    """Offer drafters; `build` returns a `Drafter`. `capabilities` is a `DrafterCapabilities`."""
    return []


# 6. What communicates with clients. Only `dovetail serve` uses one.


@hookspec
def dovetail_servers() -> list[Provider[Any]]:
    """Offer servers; `build` returns a `Server`. It runs in the front-end process, with the
    tokenizer."""
    return []


# 7. Extension points that a plugin adds, such as routes of a server or eviction policies.


@hookspec
def dovetail_extension_points() -> list[ExtensionPoint]:
    """Add extension points. Each has its own hook, which other plugins implement like those above.

    Called first, for every plugin. A plugin that implements the hook of an extension point that may
    not be installed marks it `@hookimpl(optionalhook=True)`.
    """
    return []
