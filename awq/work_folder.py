"""The folder next to the target with an unfinished conversion, so that an interrupted run can resume.

Every file is written under a temporary name and renamed, so it is complete or absent.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tinychat_mlx.awq.layer import LayerReport, SiteReport
from tinychat_mlx.awq.settings import plan_text
from tinychat_mlx.base.errors import TinychatError, UsageError
from tinychat_mlx.weights.safetensors import replacing
from tinychat_mlx.weights.shards import write_json


class LayerFiles:
    """The files of one attempt: codes, report and rows per layer."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rim = path / "rim.safetensors"
        self.judged = path / "judged.npy"

    def shard(self, layer: int) -> Path:
        return self.path / f"layer-{layer:04}.safetensors"

    def report(self, layer: int) -> Path:
        return self.path / f"layer-{layer:04}.json"

    def rows(self, layer: int) -> Path:
        return self.path / f"rows-{layer:04}.npy"

    def finished(self, steps: int, with_rows: bool) -> int:
        """Return how many steps (the layers, then the head if it is a site) are finished."""
        done = 0
        while done < steps and self.shard(done).exists() and self.report(done).exists():
            done += 1
        while with_rows and 0 < done < steps and not self.rows(done).exists():
            done -= 1
        return done

    def write_report(self, layer: int, report: LayerReport) -> None:
        write_json(self.report(layer), asdict(report))

    def read_report(self, layer: int) -> LayerReport:
        found = json.loads(self.report(layer).read_text(encoding="utf-8"))
        sites = tuple(SiteReport(**{**site, "roles": tuple(site["roles"])}) for site in found.pop("sites"))
        return LayerReport(sites, **found)

    def shards(self, layers: int) -> Iterator[Path]:
        """Yield the finished files in the order in which a model is read.

        The head's file, if any, is the last.
        """
        yield self.rim
        for layer in range(layers):
            yield self.shard(layer)
        if self.shard(layers).exists():
            yield self.shard(layers)


class WorkFolder:
    """The plan of a conversion, its calibration tokens, and the files of each method that was tried."""

    def __init__(self, target: Path) -> None:
        self.path = target.parent / f".{target.name}.converting"
        self.calibration = self.path / "calibration.npy"
        # marker: once it exists, the target may be the finished folder
        self.renaming = self.path / "renaming"

    def check(self, resume: bool, force: bool) -> None:
        """Raise UsageError if an interrupted conversion would be lost without --force or --resume."""
        if self.path.exists() and not (resume or force) and any(self.path.iterdir()):
            raise UsageError(
                "this is an interrupted conversion",
                where=self.path,
                remedy="add --resume to finish it, or --force to start again",
            )

    def begin(self, plan: dict[str, Any], resume: bool) -> None:
        """Create the folder, or continue in it if it belongs to the same conversion. Raises TinychatError."""
        text, file = plan_text(plan), self.path / "plan.json"
        try:
            if not resume and self.path.exists():
                shutil.rmtree(self.path)
            self.path.mkdir(parents=True, exist_ok=True)
            found = file.read_text(encoding="utf-8") if file.exists() else text
        except OSError as error:
            raise TinychatError(
                f"cannot be made: {error.strerror or error}",
                where=self.path,
                remedy="remove it, or choose another place",
            ) from None
        if found != text:
            raise UsageError(
                "this conversion was started with other settings, another model, backend or version",
                where=self.path,
                remedy="repeat the first command exactly, or leave out --resume and add --force",
            )
        with replacing(file) as f:
            f.write(text.encode())

    def files(self, fallback: str = "") -> LayerFiles:
        """Return the files of the requested method, or of a fallback method."""
        path = self.path / fallback if fallback else self.path
        path.mkdir(exist_ok=True)
        return LayerFiles(path)

    def is_empty(self) -> bool:
        """Return whether there is nothing to resume from."""
        return not self.calibration.exists() and not LayerFiles(self.path).shard(0).exists()

    def is_renamed(self) -> bool:
        """Return whether the finished folder has its final name."""
        return self.renaming.exists() and not (self.path / "out").exists()

    def remove(self) -> None:
        """Delete everything. The marker that the target is complete is deleted last."""
        for path in [p for p in self.path.glob("*") if p != self.renaming]:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        shutil.rmtree(self.path, ignore_errors=True)


def save(path: Path, array: npt.NDArray[Any]) -> None:
    """Write an array atomically: it is complete or absent."""
    with replacing(path) as file:
        np.save(file, array, allow_pickle=False)


def load(path: Path) -> npt.NDArray[Any]:
    array: npt.NDArray[Any] = np.load(path, allow_pickle=False)
    return array
