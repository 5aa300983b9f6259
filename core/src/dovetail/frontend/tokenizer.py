"""A model's tokenizer and chat template, read from its folder."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers

from dovetail.errors import CheckpointError, InvalidRequest
from dovetail.facts import read_json

if TYPE_CHECKING:
    from jinja2 import Template
    from jinja2.sandbox import ImmutableSandboxedEnvironment

REPLACEMENT = "\ufffd"
"""What a decoder writes for bytes that are no character (yet)."""
MAX_TEMPLATE_CHARS = 256 * 1024
MAX_RENDERED_CHARS = 8 * 2**20


class Tokenizer:
    """Wraps a `tokenizers.Tokenizer`; safe to share between threads. Raises `CheckpointError` if there is none."""

    def __init__(self, folder: Path) -> None:
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(
                f"{path} is missing: text needs a tokenizer in this form (transformers' save_pretrained writes it); "
                "without one, prompts can only be lists of token ids"
            )
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as e:  # the library raises bare Exception
            raise CheckpointError(f"{path} cannot be read: {e}") from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        config = folder / "tokenizer_config.json"
        self.config: dict[str, Any] = read_json(config) if config.is_file() else {}
        self.chat_template = _chat_template(folder, self.config)
        self._compiled: Template | None = None
        texts = {name: _token_text(self.config.get(name)) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
        self.special_tokens = {name: text for name, text in texts.items() if text is not None}

        self.is_context_free = type(self._tokenizer.decoder) is tokenizers.decoders.ByteLevel
        """A text's bytes are its tokens' bytes laid end to end: no token changes what another one says."""
        self._pieces = (_Pieces(self, False), _Pieces(self, True))
        self._whole = (_WholePieces(self._pieces[0]), _WholePieces(self._pieces[1]))

    @property
    def vocab_size(self) -> int:
        return int(self._tokenizer.get_vocab_size())

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. Raises `InvalidRequest` for text that is no valid Unicode (lone surrogates)."""
        try:
            return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)
        except (UnicodeEncodeError, TypeError):
            raise InvalidRequest("the text is not valid Unicode: it holds a lone surrogate", param="prompt") from None

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = True) -> str:
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens))

    def whole_pieces(self, skip_special_tokens: bool) -> dict[int, str | None] | None:
        """By token id, its text, or None for a token that is part of a character; filled as it is read.

        None if what a token says depends on the ones before it.
        """
        return self._whole[skip_special_tokens] if self.is_context_free else None

    def token_id(self, token: str) -> int | None:
        value = self._tokenizer.token_to_id(token)
        return None if value is None else int(value)

    def token_text(self, token_id: int) -> str:
        """A single token as text, special ones included; "" for an id that stands for no token."""
        return self._pieces[False][token_id]

    def apply_chat_template(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        template: str | None = None,
        variables: dict[str, Any] | None = None,
    ) -> str:
        """Render a conversation, in Jinja's sandbox. Raises `InvalidRequest` with the template's own complaint.

        A `template` from outside can loop for as long as it likes: the sandbox bounds what it reaches, not its time.
        """
        from jinja2 import TemplateError  # here: completions need no templates

        source = template if template is not None else self.chat_template
        if source is None:
            raise InvalidRequest("this model has no chat template: use completions, or give a chat_template", param="messages")
        if len(source) > MAX_TEMPLATE_CHARS:
            raise InvalidRequest(f"the chat template is longer than {MAX_TEMPLATE_CHARS} characters", param="chat_template")
        try:
            parts, size = [], 0
            names = {"messages": messages, "add_generation_prompt": add_generation_prompt}
            for part in self._compile(source).generate({**self.special_tokens, **(variables or {}), **names}):
                size += len(part)
                if size > MAX_RENDERED_CHARS:
                    raise InvalidRequest(f"the messages render to over {MAX_RENDERED_CHARS} characters", param="messages")
                parts.append(part)
        except (TemplateError, TypeError, ValueError, OverflowError, RecursionError, AttributeError, KeyError) as e:
            raise InvalidRequest(f"the chat template refused the messages: {type(e).__name__}: {e}", param="messages") from None
        return "".join(parts)

    def _compile(self, source: str) -> Template:
        """Compiling takes longer than rendering: the model's own template is compiled once."""
        if source != self.chat_template:
            return _environment().from_string(source)
        if self._compiled is None:
            self._compiled = _environment().from_string(source)
        return self._compiled


class _Pieces(dict[int, str]):
    """By token id, what `decode` makes of it alone."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens

    def __missing__(self, token_id: int) -> str:
        text = self[token_id] = self._tokenizer.decode([token_id], skip_special_tokens=self._skip)
        return text


class _WholePieces(dict[int, str | None]):
    """The same, with None for parts of characters."""

    def __init__(self, pieces: _Pieces) -> None:
        self._of = pieces

    def __missing__(self, token_id: int) -> str | None:
        text = self._of[token_id]
        whole = self[token_id] = None if REPLACEMENT in text else text
        return whole


def _environment() -> ImmutableSandboxedEnvironment:
    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda fmt: datetime.datetime.now().strftime(fmt)
    return env


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {t["name"]: t["template"] for t in template}.get("default")
    return template if isinstance(template, str) else None


def _token_text(token: Any) -> str | None:
    """A special token is a string, or an object that holds one."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None
