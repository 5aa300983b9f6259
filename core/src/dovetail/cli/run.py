"""Implement `dovetail serve`, `generate` and `chat`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from dovetail.frontend.outputs import Delta
from dovetail.interfaces.shadow import ShadowReport
from dovetail.interfaces.worker import Progress as ProgressCallback
from dovetail.plan import Plan
from dovetail.plugin.config import load_config
from dovetail.runtime.llm import LLM
from dovetail.types import SamplingParams

if TYPE_CHECKING:
    from dovetail.runtime.serving import AsyncEngine


@contextmanager
def progress_bars() -> Iterator[ProgressCallback]:
    """Show a progress bar for each task on stderr; without a terminal, print a line when a task
    starts and one when it ends."""
    if not sys.stderr.isatty():
        last: list[tuple[str, bool]] = []

        def line(what: str, done: int, total: int) -> None:
            state = (what, done >= total)
            if not last or last[-1] != state:
                last.append(state)
                print(f"{what}{': done' if state[1] else ' …'}", file=sys.stderr)

        yield line
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}

        def update(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(escape(what), total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield update


def serve(config_file: str | None, values: dict[str, Any], host: str, port: int) -> int:
    """Serve until SIGINT or SIGTERM."""
    from dovetail.assembly.compose import build_server
    from dovetail.runtime.serving import AsyncEngine

    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("dovetail").setLevel(logging.INFO)
    config = load_config(config_file, **values)
    with progress_bars() as progress:
        engine = AsyncEngine(config, server=True, progress=progress)
        server = build_server(config, engine.plan)
        print(
            f"dovetail: {engine.plan.model} ({engine.plan.architecture}, {engine.plan.dtype}) on"
            f" {engine.plan.device}; attention {_attention(engine)}; plan"
            f" {engine.plan.fingerprint}",
            file=sys.stderr,
        )
        try:
            server.run(
                engine,
                host,
                port,
                lambda url: print(_welcome(url, engine.plan.served_model_name), flush=True),
            )
        finally:
            _print_shadow(engine.plan, engine.shadow)
    return 0


def _attention(engine: AsyncEngine) -> str:
    return ", ".join(
        c.provider for key, c in engine.plan.choices.items() if key.startswith("attention.")
    )


def _welcome(url: str, model: str) -> str:
    return f"""
Ready: {url}   (Ctrl-C stops; docs at {url}/docs)

  curl {url}/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{{"model": "{model}", "temperature": 0, "messages": [{{"role": "user", "content": "What does os.path.join do?"}}]}}'

  from openai import OpenAI
  client = OpenAI(base_url="{url}/v1", api_key="none")
  answer = client.chat.completions.create(model="{model}", temperature=0,
      messages=[{{"role": "user", "content": "What does os.path.join do?"}}])
  print(answer.choices[0].message.content)
"""  # noqa: E501


def generate(
    config_file: str | None, values: dict[str, Any], prompts: list[str], params: SamplingParams
) -> int:
    """Complete the prompts one after another and stream the text."""
    with _loaded(config_file, values) as llm:
        for prompt in prompts:
            sys.stdout.write(prompt)
            for delta in llm.stream(prompt, params):
                _write(delta)
            print()
    return 0


def chat(
    config_file: str | None, values: dict[str, Any], system: str | None, params: SamplingParams
) -> int:
    """Hold a conversation. An empty line or Ctrl-D ends it; Ctrl-C ends the current answer."""
    messages: list[dict[str, Any]] = (
        [] if system is None else [{"role": "system", "content": system}]
    )
    with _loaded(config_file, values) as llm:
        print(
            f"{llm.plan.model}: enter a message; an empty line ends the conversation.",
            file=sys.stderr,
        )
        while question := _ask():
            messages.append({"role": "user", "content": question})
            text = ""
            try:
                for delta in llm.stream(llm.chat_prompt(messages), params):
                    _write(delta)
                    text += delta.text
            except KeyboardInterrupt:
                print(" [interrupted]", end="")
            print()
            messages.append({"role": "assistant", "content": text})
    return 0


@contextmanager
def _loaded(config_file: str | None, values: dict[str, Any]) -> Iterator[LLM]:
    with progress_bars() as progress:
        llm = LLM(config=config_file, progress=progress, **values)
    with llm:
        yield llm
        _print_shadow(llm.plan, llm.shadow)


def _print_shadow(plan: Plan, report: ShadowReport | None) -> None:
    if report is not None:
        names = {key: c.qualified_name for key, c in plan.choices.items()}
        print(*report.lines(names), sep="\n", file=sys.stderr)


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


def _write(delta: Delta) -> None:
    sys.stdout.write(delta.text)
    sys.stdout.flush()
