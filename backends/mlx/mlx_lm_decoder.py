"""mlx-lm's model in place of our decoder, for architectures that our graph does not support, on a Mac.

Used only with `--engine mlx-lm`. It has the decoder's interface (`config`, `backend`, `new_cache`, `forward`,
`advance`), so the engine, the chat and the server run on it unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinychat_mlx.backends.mlx.backend import MlxBackend
from tinychat_mlx.backends.mlx.device import mx
from tinychat_mlx.base.errors import BackendError, FormatError
from tinychat_mlx.contract import Cache, CacheShape, Choice, Tensor

# older versions run Python code that config.json names (CVE-2026-5843)
INSTALL = "pip install -U 'mlx-lm>=0.32'"


@dataclass(frozen=True)
class Limits:
    """The fields of a model's config that the engine reads."""

    vocab_size: int
    max_position_embeddings: int
    eos_token_ids: tuple[int, ...]


class ForeignCache(Cache):
    """mlx-lm's caches of all layers, and the tokens in them. Not every kind can be truncated."""

    def __init__(self, model: Any, capacity: int) -> None:
        super().__init__(CacheShape(0, 0, 0), capacity)
        self.model, self.tokens = model, mx.zeros(0, mx.int32)
        self.pending = 0  # the last `pending` tokens must be recomputed before the next one
        self.layers = self._fresh()

    def _fresh(self) -> Any:
        from mlx_lm.models.cache import make_prompt_cache

        return make_prompt_cache(self.model)

    def rewind(self, length: int) -> None:
        """Truncate every layer.

        If a layer does not support it (sliding windows, state spaces), start from an empty cache.
        """
        from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache

        surplus = self.length - length
        super().rewind(length)
        if surplus and can_trim_prompt_cache(self.layers):
            trim_prompt_cache(self.layers, surplus)
        elif surplus:
            self.layers, self.pending = self._fresh(), length
        self.tokens = self.tokens[:length]


class MlxLmDecoder:
    """A decoder that runs mlx-lm's model.

    Raises BackendError without mlx-lm or for an architecture it does not support, and FormatError for a bad
    folder.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], backend: MlxBackend | None = None) -> None:
        """config: what the folder's config.json holds."""
        self.backend = MlxBackend() if backend is None else backend
        self.backend.enter()
        self.backend.check_weights(
            folder.name, sum(f.stat().st_size for f in folder.glob("model*.safetensors"))
        )
        with self.backend.evaluating():
            self.model = load_model(folder)
        text: Mapping[str, Any] = config.get("text_config") or config
        try:
            vocabulary, context = int(text["vocab_size"]), int(text.get("max_position_embeddings", 1 << 17))
        except (KeyError, TypeError, ValueError):
            raise FormatError("vocab_size is missing or not a number", where=folder / "config.json") from None
        eos = config.get("eos_token_id", text.get("eos_token_id"))
        ends = tuple(t for t in (eos if isinstance(eos, list) else [eos]) if isinstance(t, int))
        self.config = Limits(vocabulary, context, ends)
        self.architecture = str(config.get("model_type"))
        packed = config.get("quantization")
        self.quantization = "16-bit floats"
        if isinstance(packed, dict):
            self.quantization = f"int{packed.get('bits')} g{packed.get('group_size')}"

    def new_cache(self, capacity: int) -> ForeignCache:
        """Allocate a cache. Raises BackendError if weights and cache do not fit together."""
        self.backend.enter()
        # Twice: mlx-lm's keys and values are copied while the previous step reads them
        self.backend.check_context(2 * kv_bytes(self.model, capacity), capacity)
        return ForeignCache(self.model, capacity)

    def forward(
        self, ids: Sequence[int], cache: Cache, last_only: bool = True, choice: Choice | None = None
    ) -> Tensor:
        """Continue the cache with ids (T,) -> logits (1, V) of the last, or (T, V) of all. All are exact."""
        return self._continue(self.backend.ids(ids), cache, last_only)

    def advance(self, token: Tensor, cache: Cache, choice: Choice | None = None) -> Tensor:
        """Run forward for one token (1,) that is still on the device -> logits (1, V)."""
        return self._continue(token, cache, True)

    def _continue(self, ids: Tensor, cache: Cache, last_only: bool) -> Tensor:
        assert isinstance(cache, ForeignCache)
        self.backend.enter()
        if cache.pending:
            self.model(cache.tokens[None], cache=cache.layers)
            cache.pending = 0
        logits = self.model(ids[None], cache=cache.layers)[0]
        cache.tokens = mx.concatenate([cache.tokens, ids])
        cache.length += ids.shape[0]
        return logits[-1:] if last_only else logits

    def describe(self) -> str:
        """Describe the engine for the message at start-up."""
        import mlx_lm

        return f"mlx-lm {mlx_lm.__version__} runs this model, not tinychat's own graph"


def kv_bytes(model: Any, capacity: int) -> int:
    """Return the bytes of mlx-lm's caches for `capacity` tokens, from shapes after one token (not computed)."""
    from mlx_lm.models.cache import make_prompt_cache

    layers = make_prompt_cache(model)
    model(mx.zeros((1, 1), mx.int32), cache=layers)
    return sum(held(layer, capacity) for layer in layers)


def held(cache: Any, capacity: int) -> int:
    """Return one layer's bytes.

    Keys and values grow with the tokens up to a window; a state has a fixed size.
    """
    if hasattr(cache, "caches"):
        return sum(held(c, capacity) for c in cache.caches)
    keys = getattr(cache, "keys", None)
    if keys is None:
        return int(cache.nbytes)
    rows = (keys[0] if isinstance(keys, tuple | list) else keys).shape[2]
    window = getattr(cache, "max_size", None) or getattr(cache, "chunk_size", None) or capacity
    return int(cache.nbytes * min(capacity, window) // rows)


def load_model(folder: Path) -> Any:
    """Load mlx-lm's module with its weights on the device."""
    try:
        import mlx_lm.utils
    except ImportError as e:
        raise BackendError(
            f"mlx-lm is not installed or does not load ({e})", where="--engine mlx-lm", remedy=INSTALL
        ) from None
    version = tuple(int(n) for n in mlx_lm.__version__.split(".")[:2])
    if version < (0, 32):
        raise BackendError(f"mlx-lm {mlx_lm.__version__} is too old", where="--engine mlx-lm", remedy=INSTALL)
    try:
        model, _ = mlx_lm.utils.load_model(folder)
    except (
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        FileNotFoundError,
    ) as e:  # all errors that an unsupported config can raise
        raise BackendError(
            f"mlx-lm does not load {folder.name}: {e}",
            where="--engine mlx-lm",
            remedy="choose a model that mlx-lm supports, or update mlx-lm",
        ) from None
    return model
