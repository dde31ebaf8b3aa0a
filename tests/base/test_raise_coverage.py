"""The nightly check finds all raise statements, and those that did not run."""

from __future__ import annotations

import json
from pathlib import Path

import raise_coverage


def test_a_raise_that_no_test_reached_is_named(tmp_path: Path) -> None:
    classes = raise_coverage.error_classes()
    assert {"TinychatError", "FormatError", "UsageError"} <= classes
    path = raise_coverage.ROOT / "tinychat_mlx" / "engine" / "sampler.py"
    lines = [line for line, _ in raise_coverage.sites(path, classes)]
    assert len(lines) >= 4
    report = tmp_path / "coverage.json"
    report.write_text(json.dumps({"files": {str(path): {"executed_lines": lines[1:]}}}))
    missed = [
        text
        for text in raise_coverage.uncovered(report)
        if text.startswith("tinychat_mlx/engine/sampler.py:")
    ]
    assert len(missed) == 1 and missed[0].startswith(f"tinychat_mlx/engine/sampler.py:{lines[0]}: raise ")
    assert len(raise_coverage.uncovered(report)) > 250
