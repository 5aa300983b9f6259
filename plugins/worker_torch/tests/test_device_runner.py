"""Steps on a device that runs behind the host, played on the CPU: the contracts hold, and nothing is waited for in vain."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from fake_device import CAPTURABLE, FakeAccelerator, FakeDeviceWorker

from dovetail.compose import build_engine
from dovetail.config import EngineConfig
from dovetail.errors import EngineDead, OutOfMemory, PluginError
from dovetail.plugins.discovery import load_registry
from dovetail.resolution import resolve
from dovetail.testing.attention import AttentionContract
from dovetail.testing.tiny_model import TinyModel
from dovetail.testing.worker import WorkerContract
from dovetail.types import Request, SamplingParams
from dovetail_worker_torch import dovetail_workers
from dovetail_worker_torch.graphs import ladder

(WORKER,) = dovetail_workers()
FAKE = replace(WORKER, build=FakeDeviceWorker)
MAX_STEPS = 2000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "model"
    TinyModel(random.randrange(2**31)).write(path)
    return path


class TestAttention(AttentionContract):
    """What the fake device's steps are made of: if it kept no contract, these tests would show nothing."""

    provider = CAPTURABLE


class TestWorker(WorkerContract):
    provider = FAKE
    options = {"execution": "plain"}  # noqa: RUF012


def new_engine(folder, *, fake=True, overlap=True, **worker):
    registry = load_registry()
    for i, offer in enumerate(registry.offers):
        if fake and offer.socket == "worker" and offer.provider.name == WORKER.name:
            registry.offers[i] = replace(offer, provider=FAKE)
    config = {
        "model": str(folder), "device": "cpu", "dtype": "float32", "overlap": overlap, "max_model_len": 256,
        "worker": {"use": "torch", "execution": "plain", **worker}, "attention": "torch-reference",
        "kv_cache": {"memory_gb": 0.05}, "scheduler": {"max_num_seqs": 6, "max_num_batched_tokens": 64},
    }  # fmt: skip
    return build_engine(resolve(EngineConfig.model_validate(config), registry), lambda *_: None, registry)


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
    """Greedy and drawn, with and without what has to wait for the host."""
    rng = random.Random(seed)
    kinds = [
        {}, {"temperature": 1.0}, {"temperature": 0.8, "top_k": 7, "top_p": 0.9}, {"temperature": 1.2, "min_p": 0.1, "n": 2},
        {"logprobs": 2}, {"temperature": 0.7, "repetition_penalty": 1.3}, {"frequency_penalty": 0.5}, {"min_tokens": 9},
        {"logit_bias": {5: 5.0, 6: 5.0}, "temperature": 1.0},
    ]  # fmt: skip
    requests = []
    for i, kind in enumerate(kinds + rng.sample(kinds, 5)):
        params = SamplingParams(max_tokens=max(rng.randint(1, 24), kind.get("min_tokens", 0)), **kind)
        prompt = [rng.randrange(2, 60) for _ in range(rng.choice((1, 5, 40, 90)))]
        requests.append(Request(str(i), prompt, params, params.max_tokens, rng.randrange(2**31), [0]))
    return requests


def test_queued_steps_say_what_plain_ones_say(folder):
    """All that is asked for at once, over a pipeline of two steps, as a plain loop on the CPU says it."""
    seed = random.randrange(2**31)
    queued = new_engine(folder)
    said = said_by(queued, some_requests(seed))
    assert said == said_by(new_engine(folder, fake=False, overlap=False), some_requests(seed)), f"seed {seed}"
    assert all(not error for _, _, error in said.values())
    assert any(logprobs for _, logprobs, _ in said.values())


def test_nothing_is_waited_for(folder):
    """Where tokens are all that is asked, a step is queued while the tokens of the one before are not looked at; those that
    can be are replayed."""
    engine, params = new_engine(folder), SamplingParams(max_tokens=20)
    device = device_of(engine)
    device.num_replayed = device.most_outstanding = 0
    said = said_by(engine, [Request(str(i), [5 + i] * 4, params, 20, 0, []) for i in range(3)])
    assert {len(tokens) for tokens, _, _ in said.values()} == {20}
    assert device.most_outstanding == 2
    assert device.outstanding == 0
    assert device.num_captured == len(ladder(6))
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
    requests = [Request("small", [7, 8], params, 4, 0, []), Request("large", [9] * 50, params, 4, 0, [])]
    said = said_by(engine, [requests[0]])
    assert said_by(engine, [requests[1]])["large", 0] == ([], [], ["out_of_memory"])
    again = replace_id(requests[0], "again")
    assert said_by(engine, [again])["again", 0] == said["small", 0]


def test_a_lost_device_ends_the_engine(folder, monkeypatch):
    """Not its requests alone: whatever comes after would fail as well, and a server starts a new process."""
    engine, runner = (built := new_engine(folder)), worker_of(built)._runner

    def lost(*arguments):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(runner.model, "forward", lost)
    engine.add(Request("r", [7, 8], SamplingParams(max_tokens=4), 4, 0, []))
    with pytest.raises(EngineDead, match="cpu failed, and nothing more can be run on it by this process: CUDA error"):
        engine.step()


def replace_id(request, name):
    return Request(name, request.prompt_token_ids, request.params, request.max_tokens, request.seed, request.eos_token_ids)


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), OutOfMemory, "Lower kv_cache.memory_fraction or scheduler.max_num_seqs"),
        (RuntimeError("operation not permitted when stream is capturing"), PluginError, "To run without them, set worker.on_c"),
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
    assert f"decode steps could not be captured, and run without graphs: {type(error).__name__}" in caplog.text
    assert said_by(engine, [request]) == said_by(new_engine(folder, fake=False), [request])
    assert device_of(engine).num_replayed == 0


@pytest.mark.parametrize("most", [1, 2, 3, 8, 100, 256, 300, 4096])
def test_the_ladder(most):
    """Up to 512 sequences every number has a size that is not much larger."""
    sizes = ladder(most)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == min(most, 512)
    for n in range(1, sizes[-1] + 1):
        size = min(s for s in sizes if s >= n)
        assert size - n < max(8, n / 7) or n < 8
