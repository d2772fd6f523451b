"""tokenizer.json and the chat template beside it: messages -> text -> ids, and ids -> text as they stream in.

What a user writes never becomes a special token: a random number is set after every character of their text that could
begin an added token; the rendered prompt is split at the added tokens that are still whole, which only the template can
have written; then the number is taken out, and the text between them is encoded by a BPE that knows no added token.
"""

from __future__ import annotations

import codecs
import json
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Bpe

from ivcore.chat_template import QWEN_TEMPLATE, render_template
from ivcore.errors import ConfigError, PromptError
from ivcore.files import read_json
from ivcore.processor import ProcessorConfig
from ivcore.sampling import stop_ids

Piece = str | int  # of a prompt: text, or the id of an added token


class Tokenizer:
    """A byte-level BPE, its added tokens and its chat template.

    stop_ids: the tokens that end an answer. processor, directory: of the checkpoint it was read from.
    """

    def __init__(
        self,
        content: Mapping[str, Any],
        *,
        template: str | None = None,
        stop_tokens: Iterable[str | int] = (),
        special_tokens: Mapping[str, str] | None = None,
        processor: ProcessorConfig | None = None,
        directory: Path | None = None,
    ) -> None:
        """content: of a tokenizer.json. template: None is the Qwen form. stop_tokens: ids or contents, unknown ones are
        skipped. special_tokens: variables of the template, such as bos_token."""
        added = content.get("added_tokens") or []
        try:
            self._added = {token["content"]: int(token["id"]) for token in added}
            special = [token["content"] for token in added if token.get("special")]
            self._bpe = Bpe.from_str(json.dumps({**content, "added_tokens": []}))
        # `tokenizers` raises bare Exception for whatever its Rust side cannot read.
        except Exception as error:
            raise PromptError(f"tokenizer.json cannot be used ({error}); download it again.") from None
        if "ByteLevel" not in json.dumps(content.get("decoder")):
            raise PromptError("tokenizer.json is not a byte-level BPE, the only kind supported.")
        self._special_ids = frozenset(self._added[token] for token in special)
        self._vocab_size = max([self._bpe.get_vocab_size() - 1, *self._added.values()]) + 1
        self._contents = {token_id: text for text, token_id in self._added.items()}
        self._splitter = _any_of(self._added)
        self._may_open = _openings(self._added)
        self._may_open_special = _openings(special, begun=True)
        self._template = QWEN_TEMPLATE if template is None else template
        self._special_tokens = dict(special_tokens or {})
        self.processor = processor or ProcessorConfig()
        self.directory = directory
        ids = (self.token_id(token) if isinstance(token, str) else token for token in (*stop_tokens, "<|im_end|>"))
        self.stop_ids = frozenset(each for each in ids if each is not None)

    @classmethod
    def from_dir(cls, path: str | Path) -> Tokenizer:
        """Read a checkpoint folder: tokenizer.json, its configs, its chat template and the processor configs.

        Raises PromptError or ConfigError that names the file.
        """
        folder = Path(path)
        config = _read_optional(folder / "tokenizer_config.json")
        named = {name: config.get(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
        contents = {name: token.get("content") if isinstance(token, dict) else token for name, token in named.items()}
        special = {name: content for name, content in contents.items() if isinstance(content, str)}
        eos = [special["eos_token"]] if "eos_token" in special else []
        try:
            return cls(
                read_json(folder / "tokenizer.json"),
                template=_read_template(folder, config),
                stop_tokens=stop_ids(folder) or eos,
                special_tokens=special,
                processor=ProcessorConfig.from_dir(folder),
                directory=folder,
            )
        except PromptError as error:
            raise PromptError(f"{folder}: {error}") from None

    def token_id(self, content: str) -> int | None:
        """The id of an added token, or of an entry of the vocabulary as tokenizer.json spells it."""
        token_id = self._added.get(content)
        return self._bpe.token_to_id(content) if token_id is None else token_id

    def encode(self, text: str) -> list[int]:
        """Ids of trusted text: added tokens in it are recognised, none is put around it."""
        return self.encode_pieces(self._split(text))

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of ids; bytes that are no UTF-8 become U+FFFD, ids outside the vocabulary nothing."""
        return b"".join(self.token_bytes(token_id, skip_special_tokens) for token_id in ids).decode(errors="replace")

    def token_bytes(self, token_id: int, skip_special_tokens: bool = True) -> bytes:
        """The bytes one id stands for, which may be a part of a character."""
        token_id = int(token_id)
        if token_id in self._contents:
            skipped = skip_special_tokens and token_id in self._special_ids
            return b"" if skipped else self._contents[token_id].encode()
        token = self._bpe.id_to_token(token_id) if 0 <= token_id < self._vocab_size else None
        if token is None:
            return b""
        try:
            return bytes(_BYTE_OF[character] for character in token)
        except KeyError:  # an entry of the vocabulary that is not spelled in bytes stands for itself
            return token.encode()

    def apply_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The prompt as text, to read; a user's `<|im_end|>` looks like a real one here, so encode `template_pieces`.

        messages: roles and contents as the template takes them; media as {"type": "image"} and {"type": "video"}.
        """
        pieces = self.template_pieces(messages, tools, add_generation_prompt)
        return "".join(self._contents[piece] if isinstance(piece, int) else piece for piece in pieces)

    def template_pieces(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> list[Piece]:
        """The prompt as text and ids of added tokens, by turns; only the template's own added tokens become ids.

        In an assistant's content, tokens that are not special, such as <think>, stay tokens: the model wrote them.
        """
        mark = str(secrets.randbits(128))  # digits go through JSON and filters unchanged
        marked = [self._mark_message(message, mark) for message in messages]
        text = render_template(
            self._template,
            marked,
            tools=None if tools is None else self._mark(list(tools), mark),
            add_generation_prompt=add_generation_prompt,
            special_tokens=self._special_tokens,
        )
        return [piece if isinstance(piece, int) else piece.replace(mark, "") for piece in self._split(text)]

    def encode_pieces(self, pieces: Iterable[Piece]) -> list[int]:
        """Ids of pieces; text is encoded as text, whatever it spells."""
        ids: list[int] = []
        for piece in pieces:
            if isinstance(piece, int):
                ids.append(piece)
                continue
            try:
                ids += self._bpe.encode(piece, add_special_tokens=False).ids
            except TypeError:  # how `tokenizers` refuses a str that has no UTF-8
                raise PromptError("The prompt's text is not valid Unicode (half a surrogate pair).") from None
        return ids

    def _split(self, text: str) -> list[Piece]:
        parts = self._splitter.split(text)  # text, token, text, ..., text
        return [self._added[part] if index % 2 else part for index, part in enumerate(parts) if part]

    def _mark_message(self, message: Mapping[str, Any], mark: str) -> dict[str, Any]:
        own = message.get("role") == "assistant"
        return {key: self._mark(value, mark, own and key == "content") for key, value in message.items()}

    def _mark(self, value: Any, mark: str, own: bool = False) -> Any:
        """`value` with the mark in all of its texts; `own`: only where it could begin a special token."""
        if isinstance(value, str):
            return (self._may_open_special if own else self._may_open).sub(lambda match: match[0] + mark, value)
        if isinstance(value, Mapping):
            return {self._mark(key, mark): self._mark(each, mark, own) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [self._mark(each, mark, own) for each in value]
        return value


class TextStream:
    """Ids one at a time -> text, never half a character; what `push` and `finish` give joins to `Tokenizer.decode`."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The characters that this token completes, perhaps none."""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id, self._skip))

    def finish(self) -> str:
        """U+FFFD for a character that was begun and not completed."""
        return self._decoder.decode(b"", final=True)


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Matches and captures any of the tokens, the longest first; nothing when there are none."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")


def _openings(tokens: Iterable[str], begun: bool = False) -> re.Pattern[str]:
    """Matches a character that may open one of the tokens; `begun`: only where the next one does not rule it out."""
    if not tokens:
        return re.compile("(?!)")
    first = f"[{''.join(re.escape(each) for each in sorted({token[0] for token in tokens}))}]"
    if not begun:
        return re.compile(first)
    # At the end of a text, or before white space that a template trims, the next text may go on with it.
    second = "".join(re.escape(each) for each in sorted({token[1:2] for token in tokens}))
    return re.compile(rf"{first}(?=[{second}\s]|\Z)")


def _read_optional(file: Path) -> dict[str, Any]:
    return read_json(file) if file.exists() else {}


def _read_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """chat_template.jinja, else chat_template.json, else tokenizer_config.json: a string or a list of named ones."""
    file = folder / "chat_template.jinja"
    if file.exists():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise PromptError(f"{file.name} cannot be read ({error}); download it again.") from None
    source = "chat_template.json"
    template = _read_optional(folder / source).get("chat_template")
    if template is None:
        source, template = "tokenizer_config.json", config.get("chat_template")
    if isinstance(template, list):
        named = {each.get("name"): each.get("template") for each in template if isinstance(each, dict)}
        template = named.get("default", next(iter(named.values()), ""))
    if template is not None and not isinstance(template, str):
        raise ConfigError(f"{folder / source}: chat_template is neither a template nor a list of named templates.")
    return template


def _byte_characters() -> dict[str, int]:
    """GPT-2's spelling of bytes in a vocabulary: printable ones are themselves, the others count up from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    spelled = {chr(byte): byte for byte in printable}
    rest = (byte for byte in range(0x100) if byte not in printable)
    return spelled | {chr(0x100 + index): byte for index, byte in enumerate(rest)}


_BYTE_OF = _byte_characters()
