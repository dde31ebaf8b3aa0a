"""A loaded model: logits, generation, and conversations that reuse computed tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinychat_mlx.base.errors import ContextFullError, UsageError
from tinychat_mlx.contract import Backend, Device, Memory
from tinychat_mlx.engine.engine import Engine, Event
from tinychat_mlx.engine.prefix_cache import LIMIT, PrefixStore, identity_of
from tinychat_mlx.engine.sampler import SamplingParams, from_generation_config
from tinychat_mlx.model.config import ModelConfig, token_ids
from tinychat_mlx.model.decoder import Decoder
from tinychat_mlx.weights.weight import F32

if TYPE_CHECKING:
    from tinychat_mlx.text.tokenizer import Tokenizer
    from tinychat_mlx.weights.checkpoint import Checkpoint

Message = dict[str, Any]
ANSWER_ROOM = 256  # tokens reserved for the answer when old messages are dropped


class Model:
    """A model on a device, created by `tinychat_mlx.load`. Not thread-safe."""

    def __init__(
        self,
        name: str,
        checkpoint: Checkpoint,
        config: ModelConfig,
        backend: Backend,
        device: Device,
        context: int,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self.name, self.config, self.backend, self.device, self.context = (
            name,
            config,
            backend,
            device,
            context,
        )
        self.folder: Path = checkpoint.folder
        self.nbytes: int = checkpoint.nbytes
        self.architecture = config.spec.model_type
        self.quantization: str = checkpoint.quantization.describe()
        self.generation_config: Mapping[str, Any] = checkpoint.generation_config
        self.defaults: SamplingParams = from_generation_config(checkpoint.generation_config)
        with backend.kept(checkpoint.key, checkpoint.fingerprint if config.moe is None else ""):
            self.engine = Engine(Decoder(config, checkpoint, backend, progress), context)
        self._tokenizer: Tokenizer | None = None
        self._said: tuple[str, list[int]] | None = None  # the conversation so far, as text and as tokens
        self.answer_ids: list[int] = []  # tokens of the last answer to `chat`, if they are exactly its text

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, loaded on first use: a folder without one can still compute logits."""
        if self._tokenizer is None:
            from tinychat_mlx.text.tokenizer import Tokenizer

            self._tokenizer = Tokenizer.load(self.folder)
        return self._tokenizer

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end an answer: the union of those of config, generation config and tokenizer."""
        file = token_ids(self.generation_config.get("eos_token_id"), "generation_config.json")
        return frozenset(self.tokenizer.stop_ids(self.config.eos_token_ids, file))

    @property
    def context_used(self) -> int:
        """Tokens in the context of the last conversation."""
        return len(self.engine.ids)

    def keep_in(self, folder: Path, exact: bool = False, limit: int = LIMIT) -> None:
        """Store computed keys and values in folder, up to limit bytes: `keep` writes them, `chat` reads them.

        exact: as given to `load`. Raises OSError if the model's own files cannot be read any more.
        """
        identity = identity_of(self.folder, self.config, self.device.backend, exact)
        self.engine.prefixes = PrefixStore(folder, identity, limit)

    def keep(self, whole: bool = False) -> None:
        """Write the conversation's keys and values to disk, if `keep_in` was called. whole: as in Engine.keep."""
        self.engine.keep(whole)

    def prime(self, messages: Sequence[Message], template: Mapping[str, Any] | None = None) -> None:
        """Restore a conversation from disk, so that its next answer starts sooner."""
        text = self._render(messages, {**(template or {}), "add_generation_prompt": False})
        ids = self._encode_rendered(text, messages, template or {})
        self.engine.prime(ids)

    def memory(self) -> Memory:
        return self.backend.memory()

    def logits(self, ids: Sequence[int]) -> F32:
        """Run one prefill of ids (T,) in a separate cache, without sampling -> (T, V) float32."""
        self.engine.check([*ids][: self.context - 1])
        cache = self.engine.decoder.new_cache(len(ids))
        return self.backend.to_host(self.engine.decoder.forward(list(ids), cache, last_only=False))

    def generate(self, prompt: str | Sequence[int], **sampling: Any) -> Iterator[Event]:
        """Continue a text or tokens. Keywords are the fields of SamplingParams -> events; the last has stats."""
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        return self._answer(ids, sampling)

    def chat(
        self,
        messages: Sequence[Message],
        *,
        on_full: str = "stop",
        template: Mapping[str, Any] | None = None,
        **sampling: Any,
    ) -> Iterator[Event]:
        """Answer a conversation [{"role", "content"}, …] with the model's chat template -> events.

        Tokens that this model computed before are reused. With `keep_in`, so are those of an earlier run, if the
        assistant's messages hold their tokens ("ids", from `answer_ids`). on_full "stop" raises ContextFullError when the
        messages leave no room for an answer; "slide" drops the oldest exchanges until they do, and counts the messages in
        stats.dropped_messages. template: additional template variables.
        """
        if on_full not in ("stop", "slide"):
            raise UsageError(f"unknown value {on_full!r}", where="on_full", remedy="use stop or slide")
        kept, dropped = list(messages), 0
        while True:
            text = self._render(kept, template or {})
            ids = self._encode_rendered(text, kept, template or {})
            if on_full == "stop" or len(ids) + min(ANSWER_ROOM, self.context // 4) <= self.context:
                break
            kept, gone = without_oldest(kept)
            dropped += gone
        return self._answer(ids, sampling, text, dropped)

    def _render(self, messages: Sequence[Message], template: Mapping[str, Any]) -> str:
        bare = [{k: v for k, v in m.items() if k != "ids"} for m in messages]
        return self.tokenizer.render(bare, **template)

    def _encode_rendered(
        self, text: str, messages: Sequence[Message], template: Mapping[str, Any]
    ) -> list[int]:
        """Encode a rendered conversation, reusing the exact tokens of earlier turns.

        Re-encoding text may give other tokens than the model generated, and the cache would be lost from there on.
        Joining the tokens is exact only if the remaining text begins with a special token.
        """
        said, ids = self._said or ("", [])
        if not (said and text.startswith(said) and self._is_border(text, len(said))):
            said, ids = "", []
            for count, message in enumerate(messages):
                if message.get("role") == "assistant" and self._are_tokens(message.get("ids")):
                    before = self._render(messages[:count], {**template, "add_generation_prompt": True})
                    after = before + self.tokenizer.decode(message["ids"])
                    if (
                        text.startswith(after)
                        and before.startswith(said)
                        and self._is_border(text, len(after))
                    ):
                        ids = ids + self.tokenizer.encode(before[len(said) :], special=False) + message["ids"]
                        said = after
        return ids + self.tokenizer.encode(text[len(said) :], special=False)

    def _is_border(self, text: str, at: int) -> bool:
        return at == len(text) or self.tokenizer.starts_with_special(text[at:])

    def _are_tokens(self, ids: object) -> bool:
        """Whether a message's "ids" are valid token ids: they may come from a file."""
        most = self.config.vocab_size
        return isinstance(ids, list) and bool(ids) and all(type(t) is int and 0 <= t < most for t in ids)

    def _answer(
        self, ids: list[int], sampling: Mapping[str, Any], rendered: str | None = None, dropped: int = 0
    ) -> Iterator[Event]:
        params, tokenizer = self.defaults.updated(**sampling), self.tokenizer
        self.engine.check(ids)  # raises here, at the call, not at the first event
        return self._run(ids, params, tokenizer, rendered, dropped)

    def _run(
        self, ids: list[int], params: SamplingParams, tokenizer: Tokenizer, rendered: str | None, dropped: int
    ) -> Iterator[Event]:
        from tinychat_mlx.text.streaming import StopMatcher

        stops = StopMatcher(params.stop) if params.stop else None
        events = self.engine.generate(ids, params, self.stop_ids, tokenizer.stream(), stops, dropped)
        said: list[str] = []
        try:
            for event in events:
                said.append(event.text)
                yield event
        finally:
            # Runs on close and on Ctrl-C as well, so that a partial answer can be continued.
            events.close()  # type: ignore[attr-defined]  # a generator
            answer, text = self.engine.answer, "".join(said)
            whole = (
                rendered is not None and tokenizer.decode(answer) == text
            )  # not cut by a stop string or within a character
            self._said = (rendered + text, ids + answer) if rendered is not None and whole else None
            self.answer_ids = answer if self._said else []


def without_oldest(messages: list[Message]) -> tuple[list[Message], int]:
    """Drop the oldest exchange after the system messages -> (the rest, the number of dropped messages).

    Raises ContextFullError if only the system messages and the last message are left.
    """
    head = next((i for i, m in enumerate(messages) if m.get("role") != "system"), len(messages))
    end = head + 1
    while end < len(messages) and messages[end].get("role") != "user":
        end += 1
    if end >= len(messages):
        raise ContextFullError(
            "the last message fills the whole context",
            remedy="shorten it, or load the model with a larger --context",
        )
    return messages[:head] + messages[end:], end - head
