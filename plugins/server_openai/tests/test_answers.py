"""Test responses of the completion routes: format, streams, log-probabilities. Uses OpenAI's own
client where possible."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello, wörld"}]


@pytest.fixture
def client(server: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=30
    ) as client:
        yield client


def post(http: httpx.Client, route: str, **body: Any) -> dict[str, Any]:
    answer = http.post(route, json=body)
    assert answer.status_code == 200, answer.text
    result: dict[str, Any] = answer.json()
    return result


def events(http: httpx.Client, route: str, **body: Any) -> list[dict[str, Any]]:
    """Return the chunks of a stream and check that it is well-formed to the last byte."""
    answer = http.post(route, json={**body, "stream": True})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].split(";")[0] == "text/event-stream"
    *parts, done, rest = answer.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert all(p.startswith("data: {") for p in parts)
    return [json.loads(p.removeprefix("data: ")) for p in parts]


def joined(chunks: list[dict[str, Any]], index: int = 0) -> str:
    """Return a choice's text, joined from the chunks of either route."""
    parts = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
    return "".join(p["text"] if "text" in p else p["delta"]["content"] for p in parts)


def body_of(route: str, **more: Any) -> dict[str, Any]:
    body = {"prompt": "Hello, wörld"} if route == COMPLETIONS else {"messages": MESSAGES}
    return {**body, "max_tokens": 30, "seed": 7, "ignore_eos": True, **more}


@pytest.mark.parametrize("route", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_says_what_the_whole_answer_says(
    http: httpx.Client, route: str, seed: int, n: int
) -> None:
    body = body_of(route, seed=seed, n=n, model="sim")
    whole = post(http, route, **body)
    chunks = events(http, route, **body, stream_options={"include_usage": True})
    *chunks, last = chunks
    assert [c["index"] for c in whole["choices"]] == list(range(n))
    for usage in (last["usage"], whole["usage"]):
        del usage["prompt_tokens_details"]  # the second request may hit what the first cached
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    assert whole["usage"]["completion_tokens"] == 30 * n
    assert len({c["id"] for c in [*chunks, last]}) == 1
    assert all(c["usage"] is None for c in chunks)
    for choice in whole["choices"]:
        own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
        assert joined(chunks, choice["index"]) == (
            choice["text"] if route == COMPLETIONS else choice["message"]["content"]
        )
        assert [c["finish_reason"] for c in own] == [None] * (len(own) - 1) + ["length"]
        if route == CHAT:
            assert own[0]["delta"] == {"role": "assistant", "content": ""}
            assert all(c["delta"].keys() == {"content"} for c in own[1:])
            own = own[1:]
        texts = [c["text"] if route == COMPLETIONS else c["delta"]["content"] for c in own]
        assert all(texts[:-1]), "an empty chunk"


def test_samples_of_a_seeded_request_do_not_depend_on_their_number(http: httpx.Client) -> None:
    three = post(http, COMPLETIONS, **body_of(COMPLETIONS, n=3))["choices"]
    one = post(http, COMPLETIONS, **body_of(COMPLETIONS))["choices"]
    assert three[0] == one[0]
    assert len({c["text"] for c in three}) == 3


@pytest.mark.parametrize("route", [COMPLETIONS, CHAT])
def test_greedy_is_the_same_every_time_and_unseeded_is_not(http: httpx.Client, route: str) -> None:
    body = body_of(route, seed=None)
    greedy = [post(http, route, **body, temperature=0)["choices"] for _ in range(2)]
    assert greedy[0] == greedy[1]
    assert post(http, route, **body)["choices"] != post(http, route, **body)["choices"]


@pytest.mark.parametrize("route", [COMPLETIONS, CHAT])
def test_a_stop_string_is_cut_off(http: httpx.Client, route: str) -> None:
    def text_of(choice: dict[str, Any]) -> str:
        text: str = choice["text"] if route == COMPLETIONS else choice["message"]["content"]
        return text

    whole = text_of(post(http, route, **body_of(route))["choices"][0])
    stop = whole[8:11]
    body = body_of(route, stop=[stop, "never seen"])
    [cut] = post(http, route, **body)["choices"]
    assert text_of(cut) == whole[: whole.find(stop)]
    assert (cut["finish_reason"], cut["stop_reason"]) == ("stop", stop)
    assert joined(events(http, route, **body)) == text_of(cut)
    [kept] = post(http, route, **body, include_stop_str_in_output=True)["choices"]
    assert text_of(kept) == text_of(cut) + stop
    [late] = post(http, route, **body, min_tokens=30)["choices"]
    assert (text_of(late), late["finish_reason"]) == (whole, "length")


def test_a_stop_token_counts_and_is_no_text(http: httpx.Client) -> None:
    body = body_of(COMPLETIONS, return_token_ids=True)
    [whole] = post(http, COMPLETIONS, **body)["choices"]
    token = whole["token_ids"][5]
    answer = post(http, COMPLETIONS, **body, stop_token_ids=[token])
    first = whole["token_ids"].index(token)
    assert answer["choices"][0]["token_ids"] == whole["token_ids"][: first + 1]
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["choices"][0]["stop_reason"] == token
    assert answer["usage"]["completion_tokens"] == first + 1
    chunks = events(http, COMPLETIONS, **body)
    assert [t for c in chunks for t in c["choices"][0]["token_ids"]] == whole["token_ids"]
    assert ["prompt_token_ids" in c["choices"][0] for c in chunks] == [True] + [False] * (
        len(chunks) - 1
    )
    chat = events(http, CHAT, **body_of(CHAT, return_token_ids=True))
    assert ["prompt_token_ids" in c for c in chat] == [True] + [False] * (len(chat) - 1)


def test_usage_can_be_told_all_along(http: httpx.Client) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = events(
        http, COMPLETIONS, **body_of(COMPLETIONS, prompt=["ab", "abc"], n=2), stream_options=options
    )
    counts = [c["usage"]["completion_tokens"] for c in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == 4 * 30
    assert {c["usage"]["prompt_tokens"] for c in chunks} == {5}
    assert "usage" not in events(http, COMPLETIONS, **body_of(COMPLETIONS))[-1]


def test_several_prompts_in_any_form(http: httpx.Client) -> None:
    texts = ["one", "two", "three"]
    ids = [http.post("/tokenize", json={"prompt": t}).json()["tokens"] for t in texts]
    from_texts = post(http, COMPLETIONS, **body_of(COMPLETIONS, prompt=texts, n=2))
    from_ids = post(http, COMPLETIONS, **body_of(COMPLETIONS, prompt=ids, n=2))
    assert from_texts["choices"] == from_ids["choices"]
    assert [c["index"] for c in from_ids["choices"]] == list(range(6))
    assert from_ids["usage"]["prompt_tokens"] == sum(map(len, texts))
    alone = post(http, COMPLETIONS, **body_of(COMPLETIONS, prompt=ids[1]))["choices"][0]
    assert alone["text"] == from_ids["choices"][2]["text"]
    chunks = events(http, COMPLETIONS, **body_of(COMPLETIONS, prompt=texts, n=2, echo=True))
    for i in range(6):
        assert joined(chunks, i) == texts[i // 2] + from_texts["choices"][i]["text"]


def test_log_likelihoods_as_lm_eval_asks_for_them(http: httpx.Client) -> None:
    """lm-eval sends prompts of token ids with echo and one generated token, which it drops:
    sum(token_logprobs[ctx:-1])."""
    ids = [
        http.post("/tokenize", json={"prompt": t}).json()["tokens"]
        for t in ("The answer is", "x" * 200)
    ]
    body = {
        "prompt": ids,
        "echo": True,
        "logprobs": 1,
        "max_tokens": 1,
        "temperature": 0,
        "seed": 1234,
    }
    answer = post(http, COMPLETIONS, **body)
    for prompt, choice in zip(ids, answer["choices"], strict=True):
        found = choice["logprobs"]
        length = len(prompt) + 1
        assert {
            len(found[k]) for k in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        } == {length}
        assert (found["token_logprobs"][0], found["top_logprobs"][0]) == (None, None)
        assert all(isinstance(v, float) for v in found["token_logprobs"][1:])
        # The generated token is the greedy one: the two floats must be exactly equal.
        assert found["token_logprobs"][-1] == max(found["top_logprobs"][-1].values())
        for value, top in zip(found["token_logprobs"][1:], found["top_logprobs"][1:], strict=True):
            assert value in top.values()
            assert 1 <= len(top) <= 2
        assert found["text_offset"][:3] == [0, 1, 2]
    assert answer["choices"] == post(http, COMPLETIONS, **body)["choices"]
    scored = post(http, COMPLETIONS, **{**body, "max_tokens": 0})
    assert scored["usage"]["completion_tokens"] == 0
    for choice, other in zip(scored["choices"], answer["choices"], strict=True):
        assert choice["logprobs"]["token_logprobs"] == other["logprobs"]["token_logprobs"][:-1]
        assert choice["finish_reason"] == "length"


@pytest.mark.parametrize("echo", [False, True])
def test_streamed_log_probabilities_are_those_of_the_whole(http: httpx.Client, echo: bool) -> None:
    body = body_of(COMPLETIONS, prompt="p" * 100, logprobs=2, echo=echo, temperature=0)
    whole = post(http, COMPLETIONS, **body)["choices"][0]["logprobs"]
    chunks = [c["choices"][0]["logprobs"] for c in events(http, COMPLETIONS, **body)]
    for key, values in whole.items():
        assert [v for c in chunks for v in c[key]] == values
    assert len(whole["tokens"]) == 30 + 100 * echo


def test_chunked_prefill_loses_no_log_probability_of_a_streamed_prompt(start: Any) -> None:
    served = start(scheduler={"max_num_batched_tokens": 16})
    with served.client() as http:
        body = body_of(COMPLETIONS, prompt="q" * 100, logprobs=0, echo=True, temperature=0)
        whole = post(http, COMPLETIONS, **body)["choices"][0]["logprobs"]
        chunks = [c["choices"][0]["logprobs"] for c in events(http, COMPLETIONS, **body)]
        assert len(whole["tokens"]) == 130
        assert [v for c in chunks for v in c["token_logprobs"]] == whole["token_logprobs"]


def test_chat_log_probabilities(client: openai.OpenAI) -> None:
    arguments: dict[str, Any] = {
        "model": "sim",
        "messages": MESSAGES,
        "max_tokens": 12,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 3,
    }
    whole = client.chat.completions.create(**arguments).choices[0].logprobs
    assert whole is not None
    assert whole.content is not None
    assert len(whole.content) <= 12
    for position in whole.content:
        assert len(position.top_logprobs) == 3
        assert position.logprob == position.top_logprobs[0].logprob  # greedy
        assert position.bytes is None or bytes(position.bytes).decode() == position.token
    streamed = []
    for chunk in client.chat.completions.create(**arguments, stream=True):
        if chunk.choices[0].logprobs is not None:
            streamed += chunk.choices[0].logprobs.content or []
    assert streamed == whole.content
    bare = client.chat.completions.create(**{**arguments, "top_logprobs": None}).choices[0].logprobs
    assert bare is not None
    assert [p.top_logprobs for p in bare.content or []] == [[]] * len(whole.content)


def test_prompt_log_probabilities(http: httpx.Client) -> None:
    [choice] = post(
        http, COMPLETIONS, **body_of(COMPLETIONS, prompt=[9, 10, 11], prompt_logprobs=2)
    )["choices"]
    first, *rest = choice["prompt_logprobs"]
    assert first is None
    for own, entries in zip((10, 11), rest, strict=True):
        assert entries[str(own)].keys() == {"logprob", "rank", "decoded_token"}
        assert sorted(e["rank"] for e in entries.values())[:2] == [1, 2]
        assert entries[str(own)]["logprob"] <= max(e["logprob"] for e in entries.values())
    chat = post(http, CHAT, **body_of(CHAT, prompt_logprobs=0))
    assert len(chat["prompt_logprobs"]) == chat["usage"]["prompt_tokens"]


def test_the_clients_own_types_hold(client: openai.OpenAI) -> None:
    completion = client.completions.create(
        model="sim", prompt="a", max_tokens=4, extra_body={"ignore_eos": True}
    )
    assert completion.object == "text_completion"
    assert completion.id.startswith("cmpl-")
    assert completion.usage is not None
    assert completion.usage.total_tokens == 5
    answer = client.chat.completions.create(
        model="sim", messages=MESSAGES, max_completion_tokens=4, max_tokens=9
    )  # type: ignore[arg-type]
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.system_fingerprint
    assert (answer.choices[0].message.role, answer.choices[0].message.refusal) == (
        "assistant",
        None,
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 4
    arguments: dict[str, Any] = {"model": "sim", "messages": MESSAGES, "seed": 3, "max_tokens": 30}
    text = client.chat.completions.create(**arguments).choices[0].message.content or ""
    with client.chat.completions.stream(**arguments, stop=text[5:7]) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == text[: text.find(text[5:7])]
    assert [m.id for m in client.models.list()] == ["sim"]
    assert client.models.retrieve("sim").id == "sim"


def test_many_clients_at_once(server: Any) -> None:
    async def ask(client: openai.AsyncOpenAI, i: int) -> tuple[str, str]:
        arguments: dict[str, Any] = {
            "model": "sim",
            "messages": [{"role": "user", "content": f"number {i}"}],
            "seed": i,
            "max_tokens": 10 + i,
        }
        whole = await client.chat.completions.create(**arguments)
        text = ""
        async for chunk in await client.chat.completions.create(**arguments, stream=True):
            text += chunk.choices[0].delta.content or ""
        return whole.choices[0].message.content or "", text

    async def test() -> None:
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=30
        ) as client:
            pairs = await asyncio.gather(*(ask(client, i) for i in range(40)))
        assert all(whole == streamed for whole, streamed in pairs)
        assert len({whole for whole, _ in pairs}) > 35

    asyncio.run(asyncio.wait_for(test(), 60))


def test_messages_in_parts_are_joined(http: httpx.Client) -> None:
    parts = [{"type": "text", "text": "Hello, "}, {"type": "text", "text": "wörld"}]
    messages = [MESSAGES[0], {"role": "user", "content": parts, "name": "me"}]
    assert (
        post(http, CHAT, **body_of(CHAT, messages=messages))["choices"]
        == post(http, CHAT, **body_of(CHAT))["choices"]
    )


def test_absent_max_tokens_is_sixteen_or_up_to_the_end_of_the_context(http: httpx.Client) -> None:
    for value in ({}, {"max_tokens": None}):
        assert (
            post(http, COMPLETIONS, prompt="a", ignore_eos=True, **value)["usage"][
                "completion_tokens"
            ]
            == 16
        )
        assert (
            post(http, CHAT, messages=MESSAGES, ignore_eos=True, **value)["usage"]["total_tokens"]
            == 256
        )
    clamped = post(http, COMPLETIONS, prompt="a" * 250, ignore_eos=True, max_tokens=100)
    assert clamped["usage"]["completion_tokens"] == 6
    assert clamped["choices"][0]["finish_reason"] == "length"


def test_null_is_absent_and_unknown_fields_are_ignored(http: httpx.Client) -> None:
    names = (
        "temperature",
        "top_p",
        "top_k",
        "n",
        "stop",
        "stream",
        "logit_bias",
        "logprobs",
        "stream_options",
        "user",
    )
    nulls = dict.fromkeys(names)
    plain = post(http, COMPLETIONS, **body_of(COMPLETIONS))
    assert (
        post(http, COMPLETIONS, **body_of(COMPLETIONS), **nulls, made_up={"deep": [1]})["choices"]
        == plain["choices"]
    )
    harmless = {
        "metadata": {"a": "b"},
        "store": True,
        "service_tier": "auto",
        "response_format": {"type": "text"},
        "tool_choice": "none",
    }
    assert (
        post(http, CHAT, **body_of(CHAT), **harmless)["choices"]
        == post(http, CHAT, **body_of(CHAT))["choices"]
    )


# The other routes.


def test_tokenize_counts_what_usage_counts(http: httpx.Client) -> None:
    for route, body in (
        (COMPLETIONS, {"prompt": "Hello, wörld €"}),
        (CHAT, {"messages": MESSAGES}),
    ):
        tokens = post(http, "/tokenize", **body, return_token_strs=True)
        assert tokens["count"] == len(tokens["tokens"]) == len(tokens["token_strs"])
        assert tokens["count"] == post(http, route, **body, max_tokens=1)["usage"]["prompt_tokens"]
        assert tokens["max_model_len"] == 256
    assert post(http, "/detokenize", tokens=post(http, "/tokenize", prompt="wörld")["tokens"]) == {
        "prompt": "wörld"
    }


def test_small_routes(http: httpx.Client) -> None:
    for path in ("/health", "/ping"):
        answer = http.get(path)
        assert (answer.status_code, answer.content) == (200, b"")
    assert http.get("/version").json().keys() == {"version", "plan"}
    assert http.get("/load").json() == {"server_load": 0}
    info = http.get("/tokenizer_info").json()
    assert info["eos_token"] == "<eos>"
    assert "<assistant>" in info["chat_template"]
    card = http.get("/v1/models").json()["data"][0]
    assert (card["id"], card["object"], card["max_model_len"]) == ("sim", "model", 256)
    assert http.get("/v1/models/sim").json() == card
    assert http.get("/docs").status_code == 200


def test_the_published_schema_lists_streams_and_errors(http: httpx.Client) -> None:
    paths = http.get("/openapi.json").json()["paths"]
    for route in (COMPLETIONS, CHAT):
        responses = paths[route]["post"]["responses"]
        assert responses["200"]["content"].keys() == {"application/json", "text/event-stream"}
        assert {"400", "401", "404", "413", "429", "500", "503", "504"} <= responses.keys()
        assert "422" not in responses


def test_the_published_schema_says_what_small_routes_answer(http: httpx.Client) -> None:
    paths = http.get("/openapi.json").json()["paths"]
    for method, path in (
        ("get", "/health"),
        ("get", "/live"),
        ("get", "/metrics"),
        ("post", "/reset_prefix_cache"),
    ):
        answer = http.request(method, path)
        published = paths[path][method]["responses"]["200"].get("content", {})
        assert answer.status_code == 200
        assert list(published) == (
            [answer.headers["content-type"].split(";")[0]] if answer.content else []
        )


@pytest.mark.parametrize("path", [COMPLETIONS, "/health", "/nowhere"])
def test_request_ids_are_echoed(http: httpx.Client, path: str) -> None:
    answer = http.get(path, headers={"X-Request-Id": "me-1"})
    assert answer.headers["x-request-id"] == "me-1"
    assert "x-request-id" not in http.get(path).headers


def test_the_plan_says_what_was_asked_taken_and_seen_at_work(start: Any) -> None:
    served = start()
    with served.client() as client:
        before = client.get("/v1/dovetail/plan").json()
        assert len(before["fingerprint"]) == 16
        assert before["attested"]["server"] == {
            "requested": "auto",
            "effective": "openai",
            "invoked": True,
        }
        assert before["attested"]["scheduler"]["invoked"] is False
        body = {"prompt": "a longer prompt, of several blocks", "max_tokens": 3}
        assert client.post("/v1/completions", json=body).status_code == 200
        served.until(
            lambda: client.get("/v1/dovetail/plan").json()["attested"]["worker"]["invoked"]
        )
        after = client.get("/v1/dovetail/plan").json()["attested"]
    assert after["worker"] == {"requested": "simulated", "effective": "simulated", "invoked": True}
    assert after["scheduler"]["invoked"]
    assert after["kv_cache"]["invoked"]
    assert after["speculation"] == {"requested": "none", "effective": "none", "invoked": None}
