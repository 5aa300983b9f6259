"""Gather facts about the machine and the model without a tensor library. They are the only input of
every `why_not`."""

from dovetail.facts.device import DeviceFacts, available_memory, device_facts, usable_cores
from dovetail.facts.gpus import GpuFacts
from dovetail.facts.model import LayerKind, ModelFacts, model_facts, read_json, window_of_layers

__all__ = [
    "DeviceFacts",
    "GpuFacts",
    "LayerKind",
    "ModelFacts",
    "available_memory",
    "device_facts",
    "model_facts",
    "read_json",
    "usable_cores",
    "window_of_layers",
]
