"""tinychat as a subject: a model on a backend, timed as the chat runs it."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from tinychat_mlx.apps.bench.shapes import find
from tinychat_mlx.apps.bench.synthetic import RandomSource
from tinychat_mlx.base.errors import UsageError
from tinychat_mlx.contract import Cache, Choice, Handle, Mlp
from tinychat_mlx.engine.engine import PREFILL_ROWS
from tinychat_mlx.model.config import ModelConfig, parse_config
from tinychat_mlx.model.decoder import Decoder, Layer, cache_shape
from tinychat_mlx.open import capacity_of

GREEDY = Choice()
COUNTED = 32  # number of tokens for counting the head's tiles
COLD = 256 << 20  # bytes of weights per round of products: more than caches hold


class Subject:
    """One model. The prompt has pp tokens; tg tokens are decoded after `depth` others."""

    def __init__(
        self,
        *,
        backend: str,
        pp: int,
        tg: int,
        depth: int,
        model: str | None = None,
        shape: str | None = None,
        head: str = "int8",
        exact: bool = False,
        threads: int | None = None,
    ) -> None:
        self.pp, self.tg, self.depth = pp, tg, depth
        start = time.perf_counter()
        if model is not None:
            self._load(model, backend, exact, threads)
            made = 0.0
        else:
            assert shape is not None
            made = self._invent(shape, head, backend, exact, threads)
        self._weigh()
        self.load_s = time.perf_counter() - start - made
        self.exact, config = exact, self.decoder.config
        longest = config.max_position_embeddings
        if max(pp, depth + tg) > longest:
            raise UsageError(
                f"{max(pp, depth + tg)} tokens are more than the {longest} of this model",
                where="bench",
                remedy="use a smaller --pp, --tg or --depth",
            )
        self.ids = np.random.default_rng(0).integers(0, config.vocab_size, max(pp, depth + tg)).tolist()
        self._prompt = self.decoder.new_cache(pp)
        self._steps = self._tiles = 0
        # As large as in a chat: a device that copies a cache for each token would look too fast with a small one
        self._talk = self.decoder.new_cache(max(depth + tg, capacity_of(None, longest)))
        self._fill(self._talk, self.ids[:depth])

    def _load(self, model: str, backend: str, exact: bool, threads: int | None) -> None:
        """Load a real model, as the chat does."""
        from tinychat_mlx.open import load
        from tinychat_mlx.weights.checkpoint import Checkpoint

        loaded = load(model, backend=backend, exact=exact, threads=threads)
        self.decoder, self.name = loaded.engine.decoder, loaded.name
        checkpoint, spec = Checkpoint.open(loaded.folder), loaded.config.spec
        self.weight_bytes, self.embed_bytes = checkpoint.nbytes, 0
        if checkpoint.has(spec.name("head")):
            self.embed_bytes = checkpoint.weight(spec.name("embed")).nbytes
        self.idle_bytes = 0
        moe = loaded.config.moe
        if moe is not None:
            layer = moe.layers.index(True)
            one = sum(checkpoint.weight(spec.expert(r, layer, 0)).nbytes for r in ("gate", "up", "down"))
            self.idle_bytes = one * (moe.num_experts - moe.num_experts_per_tok) * sum(moe.layers)

    def _weigh(self) -> None:
        """Use the device's own weight sizes if it stores weights in another form: those are the bytes that it reads."""
        outer = [self.decoder.inputs.tokens, self.decoder.head]
        held = {id(h): h for layer in self.decoder.layers for h in matrices(layer)} | {
            id(h): h for h in outer
        }
        backend = self.decoder.backend
        own = {i: n for i, h in held.items() if (n := backend.held_bytes(h)) is not None}
        if self.idle_bytes == 0 and len(own) == len(held):
            norms = [
                self.decoder.final_norm,
                *(n for layer in self.decoder.layers for n in layer.norms.values()),
            ]
            vectors = sum(a.nbytes for n in norms for a in (n.weight, n.bias) if a is not None)
            self.weight_bytes = sum(own.values()) + vectors
            self.embed_bytes = 0 if outer[0] is outer[1] else own[id(outer[0])]

    def _invent(self, shape: str, head: str, backend: str, exact: bool, threads: int | None) -> float:
        """Build a model of random weights -> seconds spent on generating them."""
        from tinychat_mlx.open import choose, create

        source = RandomSource(find(shape), head)
        config = parse_config(find(shape))
        self.name = shape
        self.decoder = Decoder(config, source, create(choose(backend)[0], exact, threads))
        self.weight_bytes, self.idle_bytes = sum(source.sizes.values()), 0
        self.embed_bytes = source.sizes["model.embed_tokens"] if source.has("lm_head") else 0
        return source.seconds

    def about(self) -> dict[str, Any]:
        device = self.decoder.backend.describe()
        config = self.decoder.config
        return {
            "name": self.name,
            "backend": device.backend,
            "device": device.name,
            "detail": device.detail,
            "threads": self.decoder.backend.threads,
            "load_s": self.load_s,
            "weight_bytes": self.weight_bytes,
            "kv_bytes": round(sum(self._kv_bytes(tokens) for tokens in (self.depth + self.tg, self.pp))),
            "ops_per_token": 2 * layer_weights(config),
        }

    def bytes_per_token(self) -> int:
        """Return the bytes read per decoded token: weights (one row of the embedding), keys and values."""
        rows = self.embed_bytes // self.decoder.config.vocab_size
        weights = self.weight_bytes - self.embed_bytes + rows - self.idle_bytes
        return round(weights - self._head_left_out() + self._kv_bytes(self.depth + (self.tg + 1) / 2))

    def _head_left_out(self) -> float:
        """Return the bytes of the head that a token did not read: cpu and mlx read the lower halves only if needed."""
        head = self.decoder.head
        if left_out := getattr(head, "left_out", None):
            return float(left_out(self._share()))
        if not self._tiles:
            return 0.0
        tiles, lower = -(-head.shape[0] // 16), head.shape[0] * head.shape[1] / 2
        return float(lower - self._tiles / self._steps / tiles * head.data.nbytes)  # type: ignore[attr-defined]

    def _share(self) -> float:
        """Return the share of the head's tiles that mlx reads whole, in a separate run, because counting synchronises."""
        decoder, backend = self.decoder, self.decoder.backend
        shortlist = backend.kernels.shortlist  # type: ignore[attr-defined]
        tally: list[Any] = []
        shortlist.tally = tally
        self._prompt.rewind(0)
        for at in range(0, min(self.pp, 2 * COUNTED) - 1, 2):
            decoder.forward(self.ids[at : at + 2], self._prompt, choice=GREEDY)
        shortlist.tally = None
        return float(np.mean([backend.to_host(share) for share in tally]))

    def _kv_bytes(self, tokens: float) -> float:
        """Return the bytes of a cache that the layers read, each within its window."""
        config = self.decoder.config
        layer = self.decoder.backend.kv_bytes(cache_shape(config)) / config.num_hidden_layers
        return layer * sum(min(tokens, w or tokens) for w in config.window)

    def prefill(self) -> float:
        """Return the seconds for pp tokens, up to the last one's logits on the host."""
        self._prompt.rewind(0)
        start = time.perf_counter()
        self._fill(self._prompt, self.ids[: self.pp])
        return time.perf_counter() - start

    def decode(self) -> float:
        """Return the seconds for tg tokens, one by one as in an answer: known tokens, with the argmax of each row."""
        cache, decoder = self._talk, self.decoder
        backend = decoder.backend
        cache.rewind(self.depth)
        draw = backend.sampler(0.0, 0, 1.0, 0.0, None)
        read = getattr(backend, "choice", None)
        before = 0 if read is None else read.tiles
        start = time.perf_counter()
        if draw is None:
            for token in self.ids[self.depth : self.depth + self.tg]:
                backend.to_host(decoder.forward((token,), cache, choice=GREEDY)).argmax()
        else:  # the device samples, one step ahead of the host: generate.tokens_ahead
            token = backend.ids(self.ids[:1])
            for _ in range(self.tg):
                following = draw(decoder.advance(token, cache, GREEDY))
                backend.to_host(token)
                token = following
            backend.to_host(token)
        seconds = time.perf_counter() - start
        self._steps += self.tg
        self._tiles += 0 if read is None else read.tiles - before
        return seconds

    def _fill(self, cache: Cache, ids: list[int]) -> None:
        for at in range(0, len(ids), PREFILL_ROWS):
            logits = self.decoder.forward(ids[at : at + PREFILL_ROWS], cache)
        if ids:
            self.decoder.backend.to_host(logits)

    def products(self, rows: int) -> dict[str, float] | None:
        """Time only the layers' matrix products, on cold weights: operations per second at `rows` rows."""
        backend = self.decoder.backend
        if backend.name not in ("cpu", "reference"):
            return None  # a lazy device cannot be timed product by product
        weights, size = [], 0
        for layer in self.decoder.layers:
            if not isinstance(layer.mlp, Mlp) or size > COLD:
                break
            weights += matrices(layer)
            size = sum(h.shape[0] * h.shape[1] // 2 for h in weights)
        if not weights:
            return None
        return {"ops_per_s": rate(backend, weights, rows)}


def matrices(layer: Layer) -> list[Handle]:
    """Return a layer's weights without its experts."""
    mlp = layer.mlp
    first = [mlp.gate_up, mlp.gate, mlp.up, mlp.down] if isinstance(mlp, Mlp) else [mlp.router]
    return [h for h in (*layer.qkv, layer.o, *first) if h is not None]


def rate(backend: Any, weights: list[Handle], rows: int) -> float:
    inputs = {k: backend.put(np.random.default_rng(0).standard_normal((rows, k), np.float32))
              for k in {w.shape[1] for w in weights}}  # fmt: skip
    start = time.perf_counter()
    for w in weights:
        y = backend.linear(inputs[w.shape[1]], w)
    backend.to_host(y[:1])
    return 2 * rows * sum(w.shape[0] * w.shape[1] for w in weights) / (time.perf_counter() - start)


def layer_weights(config: ModelConfig) -> int:
    """Return the weights of all layers that a token uses. A prompt token costs two operations for each of them."""
    c = config
    wide = c.num_attention_heads * c.head_dim
    attention = c.hidden_size * (2 * wide + 2 * c.num_key_value_heads * c.head_dim)
    products = 3 if c.spec.gated else 2
    total = 0
    for layer in range(c.num_hidden_layers):
        inner = c.intermediate_size
        if c.moe is not None and c.moe.layers[layer]:
            inner = c.moe.num_experts_per_tok * c.moe.moe_intermediate_size
            inner += c.moe.shared_expert_intermediate_size
        total += attention + products * c.hidden_size * inner
    return total
