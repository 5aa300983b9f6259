"""Facts of GPUs, from an NVML that this file plays, and what follows from them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from dovetail.facts import DeviceFacts
from dovetail.facts.gpus import GpuFacts, find_gpus, visible
from dovetail.plugin.provider import Context, why_not_gpu

UUIDS = ["GPU-aa11", "GPU-ab22", "GPU-cc33"]


class NVMLError(Exception):
    def __init__(self, value, text="broken"):
        super().__init__(text)
        self.value = value


def nvml(fail_at=None, error=999):
    """A machine with three GPUs."""

    def call(name, answer):
        def function(*arguments):
            if name == fail_at:
                raise NVMLError(error, "Driver/library version mismatch")
            return answer(*arguments)

        return function

    functions = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlSystemGetCudaDriverVersion_v2": lambda: 12080,
        "nvmlDeviceGetCount": lambda: len(UUIDS),
        "nvmlDeviceGetHandleByIndex": lambda i: i,
        "nvmlDeviceGetUUID": lambda i: UUIDS[i],
        "nvmlDeviceGetName": lambda i: b"Old" if i == 2 else "NVIDIA H200",
        "nvmlDeviceGetMemoryInfo": lambda i: SimpleNamespace(total=(i + 1) * 2**30),
        "nvmlDeviceGetCudaComputeCapability": lambda i: (7, 5) if i == 2 else (9, 0),
    }
    calls = {name: call(name, answer) for name, answer in functions.items()}
    return SimpleNamespace(
        NVMLError=NVMLError,
        NVML_ERROR_LIBRARY_NOT_FOUND=12,
        NVML_ERROR_DRIVER_NOT_LOADED=9,
        **calls,
    )


def test_all_that_nvml_shows():
    gpus, trouble = find_gpus({}, nvml())
    assert gpus[0] == GpuFacts("NVIDIA H200", (9, 0), 2**30, (12, 8))
    assert gpus[2] == GpuFacts("Old", (7, 5), 3 * 2**30, (12, 8))
    assert (gpus[2].architecture, len(gpus), trouble) == ("sm_75", 3, "")


@pytest.mark.parametrize(
    ("wanted", "indices"),
    [
        ("0,2", [0, 2]),
        ("2,0", [2, 0]),
        ("GPU-ab", [1]),
        ("GPU-a", []),
        ("1,9,0", [1]),
        ("1,1", [1]),
        ("", []),
        ("-1", []),
    ],
)
def test_cuda_visible_devices(wanted, indices):
    assert visible(wanted, UUIDS) == indices
    gpus, trouble = find_gpus({"CUDA_VISIBLE_DEVICES": wanted}, nvml())
    assert [g.memory_bytes >> 30 for g in gpus] == [i + 1 for i in indices]
    assert f"CUDA_VISIBLE_DEVICES is {wanted!r}" in trouble


@pytest.mark.parametrize("error", [9, 12])
def test_a_machine_without_a_driver_has_no_gpus_and_no_trouble(error):
    assert find_gpus({}, nvml("nvmlInit", error)) == ((), "")


@pytest.mark.parametrize("call", ["nvmlInit", "nvmlDeviceGetName"])
def test_a_driver_that_fails_is_said(call):
    gpus, trouble = find_gpus({}, nvml(call))
    assert gpus == ()
    assert "Driver/library version mismatch" in trouble


def test_too_old():
    gpus = (
        GpuFacts("NVIDIA H200", (9, 0), 2**37, (13, 0)),
        GpuFacts("Tesla T4", (7, 5), 2**34, (11, 4)),
    )
    facts = DeviceFacts("Linux", "x86_64", 4, 2**33, frozenset(), None, gpus=gpus)

    def reasons(device, **least):
        return [
            (r.code, str(r)) for r in why_not_gpu(Context(facts, None, device, "bfloat16"), **least)
        ]

    assert facts.devices == ["cuda:0", "cuda:1", "cpu"]
    assert reasons("cpu") == reasons("cuda:0") == []
    (_, architecture), (code, driver) = reasons("cuda:1")
    assert code == "device"
    assert architecture == "requires sm_80 or newer, but cuda:1 (Tesla T4) is sm_75"
    assert (
        driver
        == "the driver of cuda:1 supports CUDA 11.4 at most, but 12.0 is required (install a newer"
        " driver)"
    )
    assert [code for code, _ in reasons("cuda:0", architecture=(10, 0))] == ["device"]
