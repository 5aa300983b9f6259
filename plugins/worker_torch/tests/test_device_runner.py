"""Steps on a device that runs behind the host, played on the CPU: the contracts hold, and nothing
is waited for in vain."""

from __future__ import annotations

import contextlib
import gc
import random
from dataclasses import replace

import pytest
import torch
from fake_device import CAPTURABLE, FakeAccelerator, FakeDeviceWorker

from dovetail.assembly.compose import build_engine
from dovetail.composition.resolution import resolve
from dovetail.errors import EngineDead, OutOfMemory, PluginError
from dovetail.plugin.config import EngineConfig
from dovetail.plugin.discovery import load_registry
from dovetail.types import Request, SamplingParams, SequenceStart
from dovetail_testing.attention import AttentionContract
from dovetail_testing.tiny_model import TinyModel
from dovetail_testing.worker import WorkerContract
from dovetail_testing.worker_driver import Driver
from dovetail_testing.worker_trial import no_progress
from dovetail_worker_torch import dovetail_workers
from dovetail_worker_torch.runner.graphs import capture_sizes

(WORKER,) = dovetail_workers()
FAKE = replace(WORKER, build=FakeDeviceWorker)
MAX_STEPS = 2000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "model"
    TinyModel(random.randrange(2**31)).write(path)
    return path


class TestAttention(AttentionContract):
    """What the fake device's steps are made of: if it kept no contract, these tests would show
    nothing."""

    provider = CAPTURABLE


class TestWorker(WorkerContract):
    provider = FAKE
    options = {"execution": "plain"}  # noqa: RUF012


def new_engine(folder, *, fake=True, overlap=True, more=None, **worker):
    """`more`: keys of the engine config."""
    registry = load_registry()
    for i, offer in enumerate(registry.offers):
        if fake and offer.extension_point == "worker" and offer.provider.name == WORKER.name:
            registry.offers[i] = replace(offer, provider=FAKE)
    config = {
        "model": str(folder),
        "device": "cpu",
        "dtype": "float32",
        "overlap": overlap,
        "max_model_len": 256,
        "worker": {"use": "torch", "execution": "plain", **worker},
        "attention": "torch-reference",
        "kv_cache": {"memory_gb": 0.05},
        "scheduler": {"max_num_seqs": 6, "max_num_batched_tokens": 64},
        **(more or {}),
    }
    return build_engine(
        resolve(EngineConfig.model_validate(config), registry), lambda *_: None, registry
    )


def device_of(engine) -> FakeAccelerator:
    return worker_of(engine).accelerator


def worker_of(engine) -> FakeDeviceWorker:
    return engine.worker._inner


def said_by(engine, requests):
    """By request and sample: tokens, the number of log-probabilities told, and the error's code."""
    said, pending = {}, list(requests)
    for step in range(MAX_STEPS):
        if pending and step % 3 == 0:
            engine.add(pending.pop(0))
        if not pending and not engine.has_work:
            return said
        for o in engine.step():
            tokens, logprobs, error = said.setdefault((o.request_id, o.sample_index), ([], [], []))
            tokens += o.token_ids
            logprobs += [p.token_ids[0] for p in o.logprobs]
            error += [o.error[0]] if o.error else []
    raise AssertionError("requests have not ended")


def some_requests(seed: int) -> list[Request]:
    """Greedy and sampled, with and without what has to wait for the host."""
    rng = random.Random(seed)
    kinds = [
        {},
        {"temperature": 1.0},
        {"temperature": 0.8, "top_k": 7, "top_p": 0.9},
        {"temperature": 1.2, "min_p": 0.1, "n": 2},
        {"logprobs": 2},
        {"temperature": 0.7, "repetition_penalty": 1.3},
        {"frequency_penalty": 0.5},
        {"min_tokens": 9},
        {"logit_bias": {5: 5.0, 6: 5.0}, "temperature": 1.0},
    ]
    requests = []
    for i, kind in enumerate(kinds + rng.sample(kinds, 5)):
        params = SamplingParams(
            max_tokens=max(rng.randint(1, 24), kind.get("min_tokens", 0)), **kind
        )
        prompt = [rng.randrange(2, 60) for _ in range(rng.choice((1, 5, 40, 90)))]
        requests.append(
            Request(str(i), prompt, params, params.max_tokens, rng.randrange(2**31), [0])
        )
    return requests


def test_queued_steps_say_what_plain_ones_say(folder):
    """All that is asked for at once, over a pipeline of two steps, as a plain loop on the CPU says
    it."""
    seed = random.randrange(2**31)
    queued = new_engine(folder)
    said = said_by(queued, some_requests(seed))
    assert said == said_by(new_engine(folder, fake=False, overlap=False), some_requests(seed)), (
        f"seed {seed}"
    )
    assert all(not error for _, _, error in said.values())
    assert any(logprobs for _, logprobs, _ in said.values())


def test_nothing_is_waited_for(folder):
    """Where tokens are all that is asked, a step is queued while the tokens of the one before are
    not looked at; those that can be are replayed."""
    engine, params = new_engine(folder), SamplingParams(max_tokens=20)
    device = device_of(engine)
    device.num_replayed = device.most_outstanding = 0
    said = said_by(engine, [Request(str(i), [5 + i] * 4, params, 20, 0, []) for i in range(3)])
    assert {len(tokens) for tokens, _, _ in said.values()} == {20}
    assert device.most_outstanding == 2
    assert device.outstanding == 0
    assert device.num_captured == len(capture_sizes(6))
    assert 19 <= device.num_replayed <= engine.stats.num_steps - 3


def test_a_step_without_memory_fails_its_requests_alone(folder, monkeypatch):
    engine, params = new_engine(folder), SamplingParams(max_tokens=4)
    runner = worker_of(engine)._runner
    forward = runner.model.forward

    def full(token_ids, positions, attend):
        if len(token_ids) > 30:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        return forward(token_ids, positions, attend)

    monkeypatch.setattr(runner.model, "forward", full)
    requests = [
        Request("small", [7, 8], params, 4, 0, []),
        Request("large", [9] * 50, params, 4, 0, []),
    ]
    said = said_by(engine, [requests[0]])
    assert said_by(engine, [requests[1]])["large", 0] == ([], [], ["out_of_memory"])
    again = replace_id(requests[0], "again")
    assert said_by(engine, [again])["again", 0] == said["small", 0]


def test_a_lost_device_ends_the_engine(folder, monkeypatch):
    """Not its requests alone: whatever comes after would fail as well, and a server starts a new
    process."""
    engine, runner = (built := new_engine(folder)), worker_of(built)._runner

    def lost(*arguments):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(runner.model, "forward", lost)
    engine.add(Request("r", [7, 8], SamplingParams(max_tokens=4), 4, 0, []))
    with pytest.raises(
        EngineDead,
        match="cpu failed, and nothing more can be run on it by this process: CUDA error",
    ):
        engine.step()


def replace_id(request, name):
    return Request(
        name,
        request.prompt_token_ids,
        request.params,
        request.max_tokens,
        request.seed,
        request.eos_token_ids,
    )


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory"),
            OutOfMemory,
            "Lower kv_cache.memory_fraction or scheduler.max_num_seqs",
        ),
        (
            RuntimeError("operation not permitted when stream is capturing"),
            PluginError,
            "To run without them, set worker.on_c",
        ),
    ],
)
def test_a_capture_that_fails(folder, monkeypatch, caplog, error, kind, says):
    def fail(self, run):
        raise error

    monkeypatch.setattr(FakeAccelerator, "capture", fail)
    with pytest.raises(kind, match=says):
        new_engine(folder)
    request = Request("r", [3, 4], SamplingParams(max_tokens=5), 5, 0, [])
    engine = new_engine(folder, on_capture_failure="plain")
    assert (
        f"decode steps could not be captured, and run without graphs: {type(error).__name__}"
        in caplog.text
    )
    assert said_by(engine, [request]) == said_by(new_engine(folder, fake=False), [request])
    assert device_of(engine).num_replayed == 0


INT8 = {"kv_cache": {"memory_gb": 0.05, "dtype": "int8"}}


@pytest.mark.parametrize(
    "more", [INT8, {"shadow": {"attention": "attention-cpu"}}], ids=["int8", "shadow"]
)
def test_calibration_and_shadow_runs_are_on_the_workers_device(folder, more):
    """The fake device checks it; what the worker contract does besides (masks, drafts, a host
    tier), it checks there."""
    params = SamplingParams(max_tokens=5)
    ((tokens, _, error),) = said_by(
        new_engine(folder, more=more), [Request("r", [3, 4], params, 5, 0, [])]
    ).values()
    assert len(tokens) == 5
    assert not error


OF_THE_DEVICE = {
    "load": lambda worker, plan: worker.load(no_progress),
    "kv_memory": lambda worker, plan: worker.kv_memory(),
    "allocate": lambda worker, plan: worker.allocate([4]),
    "allocate_host": lambda worker, plan: worker.allocate_host([4]),
    "warm_up": lambda worker, plan: worker.warm_up(no_progress),
    "submit": lambda worker, plan: worker.submit(plan),
    "close": lambda worker, plan: worker.close(),
}


@pytest.mark.parametrize("name", OF_THE_DEVICE)
def test_the_fake_device_sees_what_is_not_on_it(folder, monkeypatch, name):
    """Its checks are what shows that the worker makes its device the current one: without that,
    each method fails."""
    worker = worker_of(new_engine(folder, more={"kv_cache": {}}))
    plan = Driver(worker, worker.kv_groups(), [9]).plan([])
    plan.seq_ids, plan.num_tokens, plan.num_computed, plan.samples, plan.new_block_ids = (
        [7],
        [1],
        [0],
        [True],
        [[[1]]],
    )
    plan.starts = [SequenceStart(7, "r", 0, [5], 1, [[]], SamplingParams(), 0, [], 9)]
    monkeypatch.setattr(FakeAccelerator, "current", lambda self: contextlib.nullcontext())
    with pytest.raises(
        (AssertionError, PluginError), match="while the device is not the current one"
    ):
        OF_THE_DEVICE[name](worker, plan)


@pytest.mark.parametrize("masked", [False, True])
def test_the_fake_device_sees_sampling_that_is_not_on_it(folder, monkeypatch, masked):
    worker = worker_of(new_engine(folder))
    driver = Driver(worker, worker.kv_groups(), [9])
    plan = driver.plan([(driver.add([5, 6]), 2)], masked=masked)
    handle = worker.submit(plan)
    monkeypatch.setattr(FakeAccelerator, "current", lambda self: contextlib.nullcontext())
    with pytest.raises(AssertionError, match="while the device is not the current one"):
        worker.sample(handle, {0: b"\xff" * 8} if masked else None)


MIB = 2**20


def test_graphs_are_measured_before_the_cache_is_sized(folder, monkeypatch, caplog):
    """The largest takes 100 MiB, each other one 10; sizes are 1, 2, 4 and 6."""
    caplog.set_level("INFO")
    monkeypatch.setattr(
        FakeAccelerator, "bytes_of_capture", lambda self: (10 if self.num_graphs else 100) * MIB
    )
    worker = worker_of(new_engine(folder, more={"kv_cache": {"memory_fraction": 0.9}}))
    device = worker.accelerator
    assert capture_sizes(6) == [1, 2, 4, 6]
    assert (
        "beside the KV cache: 1 MiB for a step, 0 for tables of sequences, 130 for CUDA graphs"
        in caplog.text
    )
    assert "CUDA graphs took 130 MiB of cpu (reserved were 130)" in caplog.text
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    assert device.num_captured == 3 + 4
    assert (device.num_graphs, device.free) == (4, 8 * 2**30 - 130 * MIB)
    worker.close()
    gc.collect()
    assert device.num_graphs == 0


def test_the_cache_gets_what_graphs_leave(folder, monkeypatch):
    monkeypatch.setattr(
        FakeAccelerator, "bytes_of_capture", lambda self: (10 if self.num_graphs else 100) * MIB
    )
    worker = worker_of(new_engine(folder, more={"kv_cache": {"memory_fraction": 0.9}}))
    worker._runner = None
    taken = 2 * 2**30
    assert worker.kv_memory() == int(10 * 2**30 * 0.9) - taken - MIB - 130 * MIB


def test_a_capture_that_takes_more_than_was_reserved_is_reported(folder, monkeypatch, caplog):
    monkeypatch.setattr(
        FakeAccelerator,
        "bytes_of_capture",
        lambda self: (50 if self.num_captured >= 3 else 10) * MIB,
    )
    new_engine(folder, more={"kv_cache": {}})
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "CUDA graphs took 200 MiB of cpu, more than the 40 reserved" in record.message


def test_a_capture_that_fails_on_trial(folder, monkeypatch, caplog):
    def fail(self, run):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(FakeAccelerator, "capture", fail)
    with pytest.raises(PluginError, match=r"To run without them, set worker\.on_c"):
        new_engine(folder, more={"kv_cache": {}})
    new_engine(folder, more={"kv_cache": {}}, on_capture_failure="plain")
    (record,) = caplog.records
    assert "decode steps could not be captured, and run without graphs" in record.message


@pytest.mark.parametrize("most", [1, 2, 3, 8, 100, 256, 300, 4096])
def test_capture_sizes(most):
    """Up to 512 sequences every number has a size that is not much larger."""
    sizes = capture_sizes(most)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == min(most, 512)
    for n in range(1, sizes[-1] + 1):
        size = min(s for s in sizes if s >= n)
        assert size - n < max(8, n / 7) or n < 8
