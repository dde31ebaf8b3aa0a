"""A conversion states its peak memory before it starts, and stays within it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_dense

from tinychat_mlx.awq import sizes
from tinychat_mlx.backends.cpu import memory

MEASURE = """
import sys
from pathlib import Path
from tinychat_mlx.apps.cli import main
code = main(sys.argv[1:])
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(int(peak.split()[1]) << 10)
sys.exit(code)
"""


def run(*args: str) -> str:
    done = subprocess.run([sys.executable, *args], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_arrays_that_a_device_keeps_are_those_of_the_cpu_backend() -> None:
    assert sizes.KEPT_BYTES == memory.KEPT


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="the system shows no process's peak memory"
)
@pytest.mark.parametrize(("hidden", "tokens"), [(1024, 2048), (1024, 4096), (2048, 2048)])
@pytest.mark.parametrize("method", ["awq", "awq+"])
def test_the_stated_peak_is_the_measured_one(method: str, hidden: int, tokens: int, tmp_path: Path) -> None:
    """Within a tenth, above or below: the pages of mapped files and what the C library keeps vary by as much."""
    shape = {
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 256,
        "head_dim": 64,
        "num_hidden_layers": 2,
        "max_position_embeddings": 1024,
    }
    folder = tiny_dense.save(
        tmp_path / "model", tiny_dense.tensors(tiny_dense.CONFIG | shape), tie_word_embeddings=True, **shape
    )
    text = tiny_dense.text(tmp_path, 3 * tokens)
    command = ["convert", str(folder), "-o", str(tmp_path / "out"), "--calib", str(text), "--method", method]
    command += ["--calib-tokens", str(tokens), "--group-size", "128", "--backend", "cpu", "--threads", "2"]
    dry = run("-m", "tinychat_mlx", *command, "--dry-run", "--json")
    stated = json.loads(dry.splitlines()[-1])["peak_bytes"]
    measured = int(run("-c", MEASURE, *command).splitlines()[-1])
    assert 0.9 < measured / stated < 1.1, f"{measured / 1e9:.2f} GB, stated {stated / 1e9:.2f} GB"
