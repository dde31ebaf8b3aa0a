"""llama.cpp as a subject, through llama-cpp-python's ctypes: an optional peer, timed in the same way."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from tinychat_mlx.apps.bench.gguf_file import library
from tinychat_mlx.base.errors import BackendError


class Subject:
    """One model file. repack=False disables its weight repacking; all else has its defaults."""

    def __init__(
        self, *, path: str, pp: int, tg: int, depth: int, threads: int, vocabulary: int, repack: bool = True
    ) -> None:
        self.pp, self.tg, self.depth = pp, tg, depth
        self.lib: Any = library("llama_cpp")
        self._quiet = self.lib.llama_log_callback(lambda level, text, data: None)
        self.lib.llama_log_set(self._quiet, None)
        start = time.perf_counter()
        self.lib.llama_backend_init()
        params = self.lib.llama_model_default_params()
        params.use_extra_bufts = repack
        params.n_gpu_layers = 0
        self.model = self.lib.llama_model_load_from_file(path.encode(), params)
        if not self.model:
            raise BackendError(
                "llama.cpp does not load this file", where=path, remedy="update llama-cpp-python"
            )
        options = self.lib.llama_context_default_params()
        options.n_ctx = max(pp, depth + tg)
        options.n_threads = options.n_threads_batch = threads
        self.context = self.lib.llama_init_from_model(self.model, options)
        if not self.context:
            raise BackendError(
                "llama.cpp cannot create a context, probably for lack of memory",
                remedy="use a smaller --pp or --depth",
            )
        self.load_s = time.perf_counter() - start
        self.memory = self.lib.llama_get_memory(self.context)
        ids = np.random.default_rng(0).integers(0, vocabulary, max(pp, depth + tg)).tolist()
        self.filled = False  # whether the cache begins with the prompt
        self.ids = (self.lib.llama_token * len(ids))(*ids)

    def about(self) -> dict[str, Any]:
        return {"load_s": self.load_s, "version": str(self.lib.__version__)}

    def prefill(self) -> float:
        """Return the seconds for pp tokens."""
        self._forget(0)
        start = time.perf_counter()
        self._feed(0, self.pp)
        seconds = time.perf_counter() - start
        self.filled = True
        return seconds

    def decode(self) -> float:
        """Return the seconds for tg tokens after `depth` others; the prompt's tokens are the first of these."""
        held = min(self.depth, self.pp) if self.filled else 0
        self._forget(held)
        self._feed(held, self.depth - held)
        start = time.perf_counter()
        for at in range(self.depth, self.depth + self.tg):
            self._feed(at, 1)
        return time.perf_counter() - start

    def _forget(self, length: int) -> None:
        self.lib.llama_memory_seq_rm(self.memory, 0, length, -1)

    def _feed(self, at: int, count: int) -> None:
        """Process tokens at: at + count in llama.cpp's own pieces; the last logits are copied to the host."""
        step = self.lib.llama_n_batch(self.context)
        for begin in range(at, at + count, step):
            n = min(step, at + count - begin)
            piece = (self.lib.llama_token * n).from_buffer(self.ids, 4 * begin)
            if self.lib.llama_decode(self.context, self.lib.llama_batch_get_one(piece, n)):
                raise BackendError(
                    "llama.cpp fails to decode", remedy="update llama-cpp-python, or leave out --against"
                )
        self.lib.llama_synchronize(self.context)
