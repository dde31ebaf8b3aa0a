"""The mutations that tests/mutants.py makes: small mistakes in the product, each of which some test must notice.

`old` must occur once in all product sources together. Where a name may be spelled in two ways, add a second pair to
`change`. Snippets are code, never comments or messages, so that a change of wording moves nothing.
"""

from __future__ import annotations

from typing import NamedTuple


class Mutation(NamedTuple):
    name: str
    area: str
    kind: str  # sign, off by one, swapped name, dropped check, wrong default, lost clamp
    change: tuple[tuple[str, str], ...]  # (old, new), one pair for each spelling
    tests: tuple[str, ...]  # base names of test files
    keyword: str = ""  # pytest's -k
    survived_before: bool = (
        False  # no test noticed when the list was made: a known gap, not a failure of the run
    )


def mutation(name: str, area: str, kind: str, old: str, new: str, tests: str, keyword: str = "") -> Mutation:
    return Mutation(name, area, kind, ((old, new),), tuple(tests.split()), keyword)


MUTATIONS = (
    # C++ kernels of the cpu backend
    mutation(
        "cpu-attention-sees-the-next-key", "cpu kernels", "off by one",
        "first, lo, position + 1)", "first, lo, position + 2)",
        "test_cpu_kernels.py", "attention_over_a_growing_cache and fp32",
    ),
    mutation(
        "cpu-packed-halves-swapped", "cpu kernels", "swapped name",
        "spread(low) | spread(high) << 4", "spread(high) | spread(low) << 4",
        "test_backends.py", "linear_is_the_matrix_product and cpu",
    ),
    mutation(
        "cpu-activation-scale", "cpu kernels", "off by one",
        ", scale = top / 127", ", scale = top / 128",
        "test_cpu_kernels.py", "linear_is_the_product",
    ),
    mutation(
        "cpu-gate-and-up-swapped", "cpu kernels", "swapped name",
        "mul(act(a[v], op.act), b[v])", "mul(act(b[v], op.act), a[v])",
        "test_backends.py", "composites_equal_their_parts and cpu",
    ),
    # Metal kernels
    mutation(
        "metal-bias-sign", "metal kernels", "sign",
        "acc[0][r] += float(scales[g]) * codes + float(biases[g]) * total",
        "acc[0][r] += float(scales[g]) * codes - float(biases[g]) * total",
        "test_kernels.py", "kernel_means_the_product and float16",
    ),
    mutation(
        "metal-gate-and-up-swapped", "metal kernels", "swapped name",
        "GLU && r % 2 ? N + n : n", "GLU && r % 2 == 0 ? N + n : n",
        "test_kernels.py", "kernel_means_the_product and float16",
    ),
    mutation(
        "metal-head-threshold-too-high", "metal kernels", "off by one",
        "below += steps * width", "below += (steps + 1) * width",
        "test_head_kernels.py", "least_reach",
    ),
    # CUDA kernels
    mutation(
        "cuda-softmax-sum-never-rescaled", "cuda kernels", "dropped factor",
        "mass[h] = mass[h] * fade[h] + total", "mass[h] = mass[h] + total",
        "test_cuda_kernels.py", "attention_of_one_row",
    )._replace(survived_before=True),  # there, a block never has more than 64 positions
    mutation(
        "cuda-odd-column-takes-its-neighbours-sum", "cuda kernels", "swapped name",
        "fmaf(bottom_bias, sum[1], y[n][3])", "fmaf(bottom_bias, sum[0], y[n][3])",
        "test_cuda_kernels.py", "matvec_is_the_product",
    ),
    mutation(
        "cuda-rope-sign", "cuda kernels", "sign",
        "fmaf(-other, s, v * c)", "fmaf(other, s, v * c)",
        "test_cuda_kernels.py", "rope_agrees",
    ),
    # The graph
    mutation(
        "graph-residual-multiplier-forgotten", "graph", "dropped factor",
        "return b.add(x, y, self.config.residual_scale)", "return b.add(x, y, 1.0)",
        "test_support.py", "family_runs_on and granite and reference and dense",
    ),
    mutation(
        "graph-parallel-mlp-reads-unnormed", "graph", "swapped name",
        "return self.mlp(h, layer, None, y)", "return self.mlp(x, layer, None, y)",
        "test_support.py", "family_runs_on and gptj and reference and dense",
    ),
    mutation(
        "graph-choice-temperature", "graph", "swapped operator",
        "temperature=choice.temperature / self.config.logit_scale",
        "temperature=choice.temperature * self.config.logit_scale",
        "test_cpu_shortlist.py", "scaled_and_capped",
    ),
    # Configuration, families, rotary positions
    mutation(
        "config-window-starts-a-layer-late", "config", "off by one",
        "window if i >= first else 0", "window if i > first else 0",
        "test_config.py", "window_starts",
    ),
    mutation(
        "families-mixtral-shares-not-normalised", "config", "wrong default",
        '{"norm_topk_prob": True}', '{"norm_topk_prob": False}',
        "test_support.py", "family_runs_on and mixtral and reference and dense",
    ),
    mutation(
        "rope-llama3-blend", "rope", "sign",
        "(length / wavelength - low) / (high - low)", "(length / wavelength - low) / (high + low)",
        "test_config.py", "rope_frequencies",
    ),
    # Formats
    mutation(
        "formats-bfloat16-ties", "formats", "off by one",
        "np.uint32(0x7FFF) + (", "np.uint32(0x8000) + (",
        "test_formats.py", "bfloat16_rounds",
    )._replace(survived_before=True),  # none of the random numbers there is half way between two
    mutation(
        "formats-awq-zero-of-a-negative-scale", "formats", "off by one",
        "np.where(flip, 15 - zeros, zeros)", "np.where(flip, 16 - zeros, zeros)",
        "test_formats.py", "negative_scales",
    ),
    mutation(
        "packing-nibbles-swapped", "formats", "swapped name",
        "q[:, 0::2] | (q[:, 1::2] << 4)", "q[:, 1::2] | (q[:, 0::2] << 4)",
        "test_weight.py", "pack_then_unpack",
    ),
    # The safetensors reader
    mutation(
        "safetensors-holes-accepted", "safetensors", "dropped check",
        "if span.begin != end:", "if span.begin < end:",
        "test_tensorfile.py", "crafted_header",
    ),
    mutation(
        "safetensors-file-without-data-refused", "safetensors", "off by one",
        "if 8 + length > size:", "if 8 + length >= size:",
        "test_tensorfile.py", "without_tensors_are_good",
    ),
    # AWQ
    mutation(
        "awq-clip-range-without-abs", "awq", "lost abs",
        "bound = np.abs(groups).max(-1, keepdims=True)", "bound = groups.max(-1, keepdims=True)",
        "test_awq_quantizer.py", "clip_takes",
    ),
    mutation(
        "awq-fold-multiplies-the-bias", "awq", "swapped operator",
        "weights.biases[site.absorber] / s", "weights.biases[site.absorber] * s",
        "test_awq_fold.py", "leaves_the_layer_unchanged and qwen2",
    ),
    Mutation(
        "awq-feedback-sign", "awq", "sign",
        (
            ("v = w[at] + product(f.u[: at.start, at].T", "v = w[at] - product(f.u[: at.start, at].T"),
            ("v = w[at] + f.u[: at.start, at].T @", "v = w[at] - f.u[: at.start, at].T @"),
        ),
        ("test_awq_quantizer.py",), "feedback_is_gptqs",
    ),
    mutation(
        "awq-moments-of-the-drift-negated", "awq", "sign",
        "missing = wanted - x", "missing = x - wanted",
        "test_awq_quantizer.py", "correction_is_the_least_squares",
    ),
    mutation(
        "awq-zero-point-unclamped", "awq", "lost clamp",
        "np.clip(-np.rint(low / scales), 0, top)", "-np.rint(low / scales)",
        "test_awq_quantizer.py", "rounding_is_awqs_rule",
    ),
    mutation(
        "awq-resume-takes-half-a-layer", "awq", "swapped operator",
        "self.shard(done).exists() and self.report(done).exists()",
        "self.shard(done).exists() or self.report(done).exists()",
        "test_convert_resume.py", "killed_anywhere and layer and not after",
    ),
    mutation(
        "awq-kl-of-the-wrong-model", "awq", "swapped name",
        "p, log_p - log_q))", "np.exp(log_q), log_p - log_q))",
        "test_awq_evaluate.py", "measures_are",
    ),
    # The engine, the sampler, the prefix cache
    mutation(
        "engine-reuses-the-whole-prompt", "engine", "off by one",
        "min(self.cache.length, len(prompt) - 1)", "min(self.cache.length, len(prompt))",
        "test_engine.py", "same_prompt_again",
    ),
    mutation(
        "engine-context-one-token-longer", "engine", "off by one",
        "len(engine.ids) >= cache.capacity", "len(engine.ids) > cache.capacity",
        "test_engine.py", "end_of_the_context",
    ),
    mutation(
        "sampler-top-p-leaves-out-the-last", "engine", "off by one",
        "np.cumsum(probabilities) - probabilities", "np.cumsum(probabilities)",
        "test_sampler.py", "distribution_equals",
    ),
    mutation(
        "prefix-cache-checksum-ignored", "engine", "dropped check",
        'if file.metadata.get("crc") != _crc(', 'if "crc" not in file.metadata and _crc(',
        "test_prefix.py", "not_what_it_should_be or no_damage",
    ),
    # Text
    mutation(
        "stops-let-out-a-letter", "text", "off by one",
        "range(min(len(stop) - 1, len(text)), 0, -1)", "range(min(len(stop) - 2, len(text)), 0, -1)",
        "test_tokenizer.py", "stop_strings_are_found or possible_beginning",
    ),
    mutation(
        "template-keeps-the-space-that-it-trims", "text", "dropped check",
        "text[:end] if text.startswith(_MARK, end) else text[:end].rstrip()", "text[:end]",
        "test_template.py", "rendered_text_equals or continue",
    ),
    mutation(
        "sandbox-underscore-names", "text", "dropped check",
        'isinstance(name, str) and name.startswith("_")', 'isinstance(name, str) and name.startswith("___")',
        "test_template_bounds.py", "reaches_nothing_outside",
    ),
    # The chat
    mutation(
        "chat-retry-forgets-the-question", "chat", "off by one",
        "chat.session.keep(at + 1)", "chat.session.keep(at)",
        "test_chat_commands.py", "undo_retry_edit",
    ),
    mutation(
        "chat-damaged-lines-skipped", "chat", "dropped check",
        "if number == len(lines):", "if number <= len(lines):",
        "test_chat_commands.py", "torn_last_line",
    ),
    mutation(
        "chat-interrupt-ignored", "chat", "dropped check",
        "if interrupt.pressed and not event.stats:", "if interrupt.pressed and event.stats:",
        "test_chat.py", "ctrl_c_stops_the_answer",
    ),
    # The hub
    mutation(
        "hub-resume-skips-a-byte", "hub", "off by one",
        'f"bytes={have}-"', 'f"bytes={have + 1}-"',
        "test_hub.py", "connection_that_breaks or stopped_pull",
    ),
    mutation(
        "hub-hash-unchecked", "hub", "dropped check",
        "return have == file.size and bool(hasher.hexdigest() == file.digest)", "return have == file.size",
        "test_hub.py", "arrives_damaged",
    ),
    # Limits, exit codes
    mutation(
        "limits-reclaimable-counted-twice", "limits", "sign",
        "or 0) - _reclaimable(folder)", "or 0) + _reclaimable(folder)",
        "test_limits.py", "containers_limits",
    ),
    mutation(
        "cli-exit-codes-swapped", "cli", "wrong default",
        "return 2 if isinstance(error, UsageError) else 1", "return 1 if isinstance(error, UsageError) else 2",
        "test_cli.py", "exit_1 or exit_2",
    ),
)  # fmt: skip
