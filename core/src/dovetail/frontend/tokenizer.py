"""Load a model's tokenizer and chat template from its folder."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers

from dovetail.errors import CheckpointError, InvalidRequest
from dovetail.facts import read_json
from dovetail.frontend.control_tokens import ControlTokens

if TYPE_CHECKING:
    from jinja2 import Template
    from jinja2.sandbox import ImmutableSandboxedEnvironment

REPLACEMENT = "\ufffd"
"""Character that a decoder writes for bytes that are not (yet) a character."""
NAMED_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
"""Special tokens that a chat template can use by name, as in transformers."""
LONG_TEXT = 10_000
"""Length in characters, or tokens, from which the library is called so that other threads can run
meanwhile."""
MAX_TEMPLATE_CHARS = 256 * 1024
MAX_RENDERED_CHARS = 8 * 2**20


class Tokenizer:
    """A model's tokenizer and chat template, safe to share between threads. Raises
    `CheckpointError` if there is no tokenizer."""

    def __init__(self, folder: Path) -> None:
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(
                f"{path} is missing: text prompts need a tokenizer in this format (transformers'"
                " save_pretrained writes it); without one, prompts can only be lists of token ids"
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
        self._plain: tokenizers.Tokenizer | None = None
        """The tokenizer that encodes control tokens as text; built when needed."""
        texts = {name: _token_text(self.config.get(name)) for name in NAMED_TOKENS}
        self.special_tokens = {name: text for name, text in texts.items() if text is not None}

        self._pieces = _Pieces(self)
        added = self._tokenizer.get_added_tokens_decoder()
        self._special_ids = frozenset(
            token_id for token_id, token in added.items() if token.special
        )
        self._control = ControlTokens([token.content for token in added.values() if token.special])
        hidden = {skip: _HiddenTokens(self, skip) for skip in (False, True)}
        self._hidden = hidden
        self._bytes = (
            {skip: _TokenBytes(self, hidden[skip]) for skip in hidden}
            if _is_byte_level(self._tokenizer)
            else None
        )

    @property
    def vocab_size(self) -> int:
        return int(self._tokenizer.get_vocab_size())

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of a text. Raises `InvalidRequest` for text that is not valid
        Unicode (lone surrogates)."""
        try:
            if len(text) > LONG_TEXT:  # as a batch, for which the library releases the GIL
                (encoding,) = self._tokenizer.encode_batch_fast(
                    [text], add_special_tokens=add_special_tokens
                )
                return list(encoding.ids)
            return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)
        except (UnicodeEncodeError, TypeError):
            raise InvalidRequest(
                "the text is not valid Unicode: it contains a lone surrogate", param="prompt"
            ) from None

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = True) -> str:
        if len(token_ids) > LONG_TEXT:
            return str(
                self._tokenizer.decode_batch([token_ids], skip_special_tokens=skip_special_tokens)[
                    0
                ]
            )
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens))

    def hidden_tokens(self, skip_special_tokens: bool) -> dict[int, bool]:
        """Return whether a token never has text, by token id; filled on access."""
        return self._hidden[skip_special_tokens]

    def token_bytes(self, skip_special_tokens: bool) -> dict[int, bytes] | None:
        """Return the bytes of a token, by token id; filled on access. None if the decoder is not
        byte-level: the text of a token then depends on the tokens next to it."""
        return None if self._bytes is None else self._bytes[skip_special_tokens]

    def token_id(self, token: str) -> int | None:
        value = self._tokenizer.token_to_id(token)
        return None if value is None else int(value)

    def token_text(self, token_id: int) -> str:
        """Return the text of a single token, special ones included; an empty string for an unknown
        id."""
        return self._pieces[token_id]

    def apply_chat_template(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        template: str | None = None,
        variables: dict[str, Any] | None = None,
    ) -> str:
        """Render a conversation in Jinja's sandbox. Raises `InvalidRequest` with the template's own
        error.

        The sandbox limits what a template can access, not how long it runs: a `template` from a
        client can loop forever.
        """
        from jinja2 import TemplateError  # imported here because completions need no templates

        source = template if template is not None else self.chat_template
        if source is None:
            raise InvalidRequest(
                "this model has no chat template: use completions, or pass a chat_template",
                param="messages",
            )
        if len(source) > MAX_TEMPLATE_CHARS:
            raise InvalidRequest(
                f"the chat template is longer than {MAX_TEMPLATE_CHARS} characters",
                param="chat_template",
            )
        try:
            parts, size = [], 0
            names = {"messages": messages, "add_generation_prompt": add_generation_prompt}
            # `tools` and `documents` are always defined, because a template may test whether they
            # are none.
            given = {
                "tools": None,
                "documents": None,
                **self.special_tokens,
                **(variables or {}),
                **names,
            }
            for part in self._compile(source).generate(given):
                size += len(part)
                if size > MAX_RENDERED_CHARS:
                    raise InvalidRequest(
                        f"the rendered messages have more than {MAX_RENDERED_CHARS} characters",
                        param="messages",
                    )
                parts.append(part)
        except (
            TemplateError,
            TypeError,
            ValueError,
            OverflowError,
            RecursionError,
            AttributeError,
            KeyError,
        ) as e:
            raise InvalidRequest(
                f"the chat template rejected the messages: {type(e).__name__}: {e}",
                param="messages",
            ) from None
        return "".join(parts)

    def encode_chat(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        template: str | None = None,
        variables: dict[str, Any] | None = None,
        add_special_tokens: bool = False,
        max_chars: int = MAX_RENDERED_CHARS,
    ) -> list[int]:
        """Return the token ids of a conversation. Raises `InvalidRequest` if it renders to more
        than `max_chars`.

        Only the template produces control tokens. If a message contains the text of one, it is
        encoded as text, so that a user cannot impersonate the system or the assistant.
        """
        marker = self._control.marker(messages)
        rendered = self.apply_chat_template(
            messages if marker is None else self._control.marked(messages, marker),
            add_generation_prompt=add_generation_prompt,
            template=template,
            variables=variables,
        )
        if len(rendered) > max_chars:
            raise InvalidRequest(
                f"the rendered messages have {len(rendered)} characters, more than fit into the"
                " context",
                param="messages",
            )
        if marker is None:
            return self.encode(rendered, add_special_tokens=add_special_tokens)
        token_ids: list[int] = []
        for i, part in enumerate(self._control.parts(rendered, marker)):
            if i % 2:
                token_ids += self._as_text(part)
            elif part:
                token_ids += self.encode(
                    part, add_special_tokens=add_special_tokens and not token_ids
                )
        return token_ids

    def _as_text(self, text: str) -> list[int]:
        """Return the token ids of a text, with control tokens encoded as text."""
        if self._plain is None:
            self._plain = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
            self._plain.encode_special_tokens = True
        return list(self._plain.encode(text, add_special_tokens=False).ids)

    def _compile(self, source: str) -> Template:
        """Compile a template. Compiling is slower than rendering, so the model's own template is
        compiled only once."""
        if source != self.chat_template:
            return _environment().from_string(source)
        if self._compiled is None:
            self._compiled = _environment().from_string(source)
        return self._compiled


class _Pieces(dict[int, str]):
    """The decoded text of single tokens, by token id, special tokens included."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def __missing__(self, token_id: int) -> str:
        text = self[token_id] = self._tokenizer.decode([token_id], skip_special_tokens=False)
        return text


class _HiddenTokens(dict[int, bool]):
    """Values of `Tokenizer.hidden_tokens`."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer._special_ids if skip_special_tokens else frozenset()

    def __missing__(self, token_id: int) -> bool:
        is_hidden = self[token_id] = (
            token_id in self._skipped or not self._tokenizer._tokenizer.id_to_token(token_id)
        )
        return is_hidden


class _TokenBytes(dict[int, bytes]):
    """Values of `Tokenizer.token_bytes`."""

    def __init__(self, tokenizer: Tokenizer, is_hidden: dict[int, bool]) -> None:
        self._tokenizer = tokenizer
        self._is_hidden = is_hidden

    def __missing__(self, token_id: int) -> bytes:
        token = (
            ""
            if self._is_hidden[token_id]
            else str(self._tokenizer._tokenizer.id_to_token(token_id))
        )
        # A token with a character outside the alphabet (an added token) is its own text.
        values = [BYTE_OF_CHARACTER.get(character) for character in token]
        found = self[token_id] = token.encode() if None in values else bytes(values)  # type: ignore[arg-type]
        return found


def _byte_alphabet() -> dict[str, int]:
    """Return the byte for each character of byte-level tokens (GPT-2, Radford et al. 2019):
    printable Latin-1 characters stand for themselves, the other bytes are numbered from 256."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + i): byte for i, byte in enumerate(others)
    }


BYTE_OF_CHARACTER = _byte_alphabet()


def _is_byte_level(tokenizer: tokenizers.Tokenizer) -> bool:
    if tokenizer.decoder is None:
        return False
    decoder = json.loads(tokenizer.decoder.__getstate__())
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    return [step["type"] for step in steps] == ["ByteLevel"]


def _environment() -> ImmutableSandboxedEnvironment:
    """Create the Jinja environment that transformers uses: the same filters, functions and tags."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """Support for `{% generation %}`, which marks the assistant's text for training; here it
        only opens a scope."""

        tags = {"generation"}  # noqa: RUF012  (Jinja's own declaration)

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda fmt: datetime.datetime.now().strftime(fmt)
    return env


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        # Clients can read the template: a link may lead only into the folder or the hub's cache.
        target, allowed = (
            path.resolve(),
            (folder.resolve(), folder.resolve().parent.parent / "blobs"),
        )
        if not any(target.is_relative_to(place) for place in allowed):
            raise CheckpointError(f"{path} is a link to {target}, outside the model's folder")
        return target.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {t["name"]: t["template"] for t in template}.get("default")
    return template if isinstance(template, str) else None


def _token_text(token: Any) -> str | None:
    """Return the text of a special token, which is a string or an object with one."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None
