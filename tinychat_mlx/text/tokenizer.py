"""Tokenizer: text to token ids and back, chat messages to text.

The library `tokenizers` runs tokenizer.json. The results equal those of transformers' AutoTokenizer, which is not
imported. (For a few old vocabularies transformers 5 rebuilds the pipeline in Python and ignores part of
tokenizer.json; there this module follows the file.) `tokenizers` is imported on first use, so that `--help` does not
load it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinychat_mlx.base.errors import FormatError, TokenizerError
from tinychat_mlx.base.json_file import read_optional
from tinychat_mlx.text.chat_template import ChatTemplate, Message, find_template
from tinychat_mlx.text.streaming import StopMatcher, Stream, clean_up_spaces, stream

if TYPE_CHECKING:
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as RawTokenizer

__all__ = ["StopMatcher", "Stream", "Tokenizer"]

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_SLOW_FILES = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json")


class Tokenizer:
    """Encodes text, decodes ids and renders messages, for one model folder."""

    def __init__(self, raw: RawTokenizer, special_tokens: Mapping[str, str], clean_up: bool = False) -> None:
        """special_tokens: `bos_token`, `eos_token`, … -> their text. clean_up: see clean_up_spaces."""
        self._raw = raw
        self._clean_up = clean_up
        self.special_tokens = dict(special_tokens)
        self.template: ChatTemplate | None = None
        added = raw.get_added_tokens_decoder()
        self._added_tokens = {token.content: number for number, token in added.items()}
        self._borders = tuple(token.content for token in added.values() if token.content and not token.lstrip)
        self.special_ids = frozenset(number for number, token in added.items() if token.special)

    @classmethod
    def load(cls, folder: Path, chat_template: str | None = None) -> Tokenizer:
        """Read tokenizer.json and its side files. `chat_template` (Jinja text) replaces the folder's own.

        Raises TokenizerError if a file is missing or damaged. A folder without a chat template is valid.
        """
        folder = Path(folder)
        raw = _read_raw(folder)
        config = _read_object(folder / "tokenizer_config.json")
        named, extra, declared = _special_tokens(folder, config)
        _add_missing(raw, named, extra, declared)
        # Made for word-level vocabularies. It would delete real spaces of BPE, so transformers 5 skips it there.
        forced = config.get("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", False)
        words = type(raw.model).__name__ != "BPE" or bool(forced)
        tokenizer = cls(
            raw,
            {name: token.content for name, token in named.items()},
            clean_up=bool(config.get("clean_up_tokenization_spaces", False)) and words,
        )
        if config.get("split_special_tokens") is True:
            raw.encode_special_tokens = True
        found = find_template(folder, config, chat_template)
        if found is not None:
            tokenizer.template = ChatTemplate(*found, tokenizer.special_tokens)
        return tokenizer

    # -- text and ids

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Encode a text. special: add the special tokens that the model expects, e.g. BOS (not for rendered chats)."""
        try:
            return self._raw.encode(text, add_special_tokens=special).ids
        except TypeError:
            if not isinstance(text, str):
                raise
            raise TokenizerError(
                "half of a surrogate pair is not a character", where="text", remedy="remove it"
            ) from None

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Decode ids to text without special tokens. Ids outside the vocabulary are skipped."""
        text = self._raw.decode(list(ids), skip_special_tokens=skip_special)
        return clean_up_spaces(text) if self._clean_up else text

    def stream(self, skip_special: bool = True) -> Stream:
        """Start a streaming decoder: the results of `push(id)` and `flush()`, joined, equal decode(all ids)."""
        return stream(self._raw, self.special_ids if skip_special else frozenset(), self._clean_up)

    @property
    def vocab_size(self) -> int:
        """Number of tokens including added ones (the model's embedding may have more rows)."""
        return self._raw.get_vocab_size(with_added_tokens=True)

    def id_of(self, token: str) -> int | None:
        """Return the id of a token by its name in the vocabulary, or None."""
        return self._raw.token_to_id(token)

    @property
    def bos_token(self) -> str | None:
        return self.special_tokens.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        return self.special_tokens.get("eos_token")

    @property
    def bos_id(self) -> int | None:
        return None if self.bos_token is None else self.id_of(self.bos_token)

    @property
    def eos_id(self) -> int | None:
        return None if self.eos_token is None else self.id_of(self.eos_token)

    # -- conversations

    def render(self, messages: Sequence[Message], /, **kwargs: Any) -> str:
        """Render messages with the model's chat template. The arguments are those of ChatTemplate.render.

        Raises TokenizerError if the model has no template, or if the template refuses the messages.
        """
        if self.template is None:
            raise TokenizerError(
                "the model has no chat template", remedy="use plain prompts, or give a template file"
            )
        return self.template.render(messages, **kwargs)

    def encode_chat(self, messages: Sequence[Message], /, **kwargs: Any) -> list[int]:
        """Render messages and encode them. The template writes the special tokens, so none are added."""
        return self.encode(self.render(messages, **kwargs), special=False)

    def starts_with_special(self, text: str) -> bool:
        """Whether a text begins with an added token, which is split off regardless of the text before it."""
        return text.startswith(self._borders)

    def stop_ids(
        self, config_eos: int | Iterable[int] | None = None, generation_eos: int | Iterable[int] | None = None
    ) -> frozenset[int]:
        """Return all tokens that end an answer: those of config.json, generation_config.json and the tokenizer, and the
        one that the chat template writes after an answer. Published models omit any of the four.
        """
        ids = {self.eos_id, self._turn_end_id()}
        for eos in (config_eos, generation_eos):
            ids |= {eos} if isinstance(eos, int) else set(eos or ())
        return frozenset(number for number in ids if number is not None)

    def _turn_end_id(self) -> int | None:
        """Return the added token that the template writes directly after an assistant's message, or None."""
        answer = "TINYCHAT-ANSWER"
        chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": answer}]
        try:
            text = self.render(chat, add_generation_prompt=False)
        except TokenizerError:  # no template, or one that refuses this conversation
            return None
        behind = text.rpartition(answer)[2].lstrip()
        names = [name for name in self._added_tokens if name and behind.startswith(name)]
        return self._added_tokens[max(names, key=len)] if answer in text and names else None


def _read_raw(folder: Path) -> RawTokenizer:
    from tokenizers import Tokenizer as RawTokenizer

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise _missing(folder)
    try:
        raw = RawTokenizer.from_file(str(path))
    except BaseException as error:  # the library raises nothing narrower; its panics are not Exceptions
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise TokenizerError(f"not a tokenizer ({error})", where=path, remedy="download it again") from error
    raw.no_truncation()
    raw.no_padding()
    return raw


def _missing(folder: Path) -> TokenizerError:
    slow = [name for name in _SLOW_FILES if (folder / name).is_file()]
    if not slow:
        remedy = "download the model's tokenizer files too"
        return TokenizerError("tokenizer.json is missing", where=folder, remedy=remedy)
    call = f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
    return TokenizerError(
        f"tokenizer.json is missing, there is only {slow[0]}",
        where=folder,
        remedy=f"make it with transformers: {call}",
    )


def _read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object; a missing file is an empty one."""
    try:
        return read_optional(path)
    except FormatError as error:
        raise TokenizerError(error.what, where=path, remedy="download it again") from error


def _special_tokens(
    folder: Path, config: Mapping[str, Any]
) -> tuple[dict[str, AddedToken], list[AddedToken], list[AddedToken]]:
    """Return named, additional special, and declared added tokens from the JSON files next to tokenizer.json.

    special_tokens_map.json is a legacy file, used only if tokenizer_config.json declares no added tokens.
    """
    path = folder / "tokenizer_config.json"
    values, declared = dict(config), []
    if "added_tokens_decoder" in config:
        table = config["added_tokens_decoder"]
        try:
            if not isinstance(table, dict):
                raise TypeError("not an object")
            declared = [_added_token(table[key], path, key) for key in sorted(table, key=int)]
        except (TypeError, ValueError) as error:
            raise TokenizerError(
                f"'added_tokens_decoder': {error}", where=path, remedy="download it again"
            ) from error
    else:
        values |= _read_object(folder / "special_tokens_map.json")
    known = {token.content: token for token in declared}
    extra = values.get("extra_special_tokens") or values.get("additional_special_tokens") or []
    if not isinstance(extra, dict | list):
        raise TokenizerError(
            "'extra_special_tokens' is not a list of tokens", where=path, remedy="download it again"
        )
    if isinstance(extra, dict):  # tokens named by this model: {"image_token": "<image>"}
        values |= extra
        names, extra = [*_NAMED, *extra], []
    else:
        own = [key for key, value in values.items() if key.endswith("_token") and isinstance(value, str)]
        names = [*_NAMED, *(key for key in own if key not in _NAMED)]  # "image_token" and similar
    named = {}
    for name in names:
        if values.get(name) is not None:
            token = _added_token(values[name], path, name)
            named[name] = known.get(token.content, token)
    return named, [_added_token(value, path, "extra_special_tokens") for value in extra], declared


def _added_token(value: Any, path: Path, key: str) -> AddedToken:
    from tokenizers import AddedToken

    if isinstance(value, str):
        return AddedToken(value, special=True)
    if isinstance(value, dict) and isinstance(value.get("content"), str):
        names = ("single_word", "lstrip", "rstrip", "normalized")
        flags = {name: value[name] for name in names if name in value}
        if all(isinstance(flag, bool) for flag in flags.values()):
            return AddedToken(value["content"], special=bool(value.get("special", True)), **flags)
    raise TokenizerError(f"{key!r} is not a token", where=path, remedy="download it again")


def _add_missing(
    raw: RawTokenizer,
    named: Mapping[str, AddedToken],
    extra: Sequence[AddedToken],
    declared: Sequence[AddedToken],
) -> None:
    """Add the tokens that tokenizer.json lacks or has with other flags, in transformers' order."""
    there = raw.get_added_tokens_decoder().values()
    same = {repr(token) for token in there}
    missing = [token for token in declared if repr(token) not in same]
    contents = {token.content for token in [*there, *missing]}
    for token in [*named.values(), *extra]:
        if token.content not in contents:
            contents.add(token.content)
            missing.append(token)
    names = {token.content for token in named.values()}
    for token in missing:
        token.special = token.special or token.content in names
    if missing:
        raw.add_tokens(missing)
