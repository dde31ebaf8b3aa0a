"""Choose the cuda backend's device and its memory limit, and explain why no device is usable."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import torch

from tinychat_mlx.base.errors import BackendError

ENVIRONMENT = "TINYCHAT_CUDA_DEVICE"  # "cpu": the pure-torch path on CPU tensors, for tests; or "0", "1", …
RESERVE = 256 << 20  # bytes left free on a discrete GPU: context, cuBLAS workspace
RESERVE_SHARED = 768 << 20  # bytes left free if CPU and GPU share their memory: the system needs some
OLDEST = (7, 5)  # the kernels need tensor cores of Turing or newer


def find() -> torch.device:
    """Return the device to use. Raises BackendError with a one-line message if there is none."""
    asked = os.environ.get(ENVIRONMENT, "").strip().removeprefix("cuda:")
    if asked == "cpu":
        return torch.device("cpu")
    if asked and not asked.isdecimal():
        raise BackendError(
            f"{asked!r} is not a device", where=ENVIRONMENT, remedy="set it to cpu or the number of a GPU"
        )
    if torch.version.cuda is None:
        raise BackendError(
            f"torch {torch.__version__} was built without CUDA",
            where="cuda backend",
            remedy="install NVIDIA's or pytorch.org's CUDA build of torch, or use --backend cpu",
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exception has the same information
            torch.cuda.init()  # type: ignore[no-untyped-call]
            device = torch.device("cuda", int(asked or 0))
            if device.index >= torch.cuda.device_count():
                raise BackendError(
                    f"this machine has {torch.cuda.device_count()} CUDA device(s), there is no number {asked}",
                    where=ENVIRONMENT,
                    remedy="set a lower number, or unset it",
                )
            torch.cuda.set_device(device)
            torch.ones(1, device=device).add_(1).item()  # fails if torch has no code for this GPU
    except (RuntimeError, AssertionError) as e:
        raise explain(str(e)) from None
    return device


def explain(text: str) -> BackendError:
    """Convert torch's multi-line error about an unusable GPU to a one-line error with a remedy."""
    first = next((line.strip() for line in text.splitlines() if line.strip()), "torch gave no reason")
    if "no NVIDIA driver" in text or "driver shared library" in text:
        return _broken("no NVIDIA driver is loaded on this machine", "install it, or use --backend cpu")
    if "driver" in text and "too old" in text:
        return _broken(
            f"the NVIDIA driver is too old for torch {torch.__version__} (CUDA {torch.version.cuda})",
            "update the driver, or install a torch built for an older CUDA",
        )
    if "no kernel image" in text:
        return _broken(
            f"torch {torch.__version__} has no code for this GPU",
            "install a build for it (on a Jetson: NVIDIA's own wheel)",
        )
    if "No CUDA GPUs" in text or "no CUDA-capable device" in text:
        return _broken("no CUDA GPU is visible", "check CUDA_VISIBLE_DEVICES, or use --backend cpu")
    return _broken(f"the GPU cannot be used: {first}")


def _broken(what: str, remedy: str = "") -> BackendError:
    return BackendError(what, where="cuda backend", remedy=remedy)


def is_shared(device: torch.device) -> bool:
    """Return whether CPU and GPU share one memory, as on a Jetson.

    An allocation by either reduces it for both.
    """
    if device.type != "cuda":
        return True
    return bool(getattr(torch.cuda.get_device_properties(device), "is_integrated", False))


def available(device: torch.device) -> int:
    """Return the bytes that can still be allocated safely; 0 if unknown.

    On shared memory the driver's "free" does not count the page cache. It contains the mapped checkpoint and
    is reclaimable. MemAvailable counts it.
    """
    if device.type != "cuda":
        return mem_available()
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if is_shared(device) and (system := mem_available()):
        return max(system + cached - RESERVE_SHARED, 0)
    free, _ = torch.cuda.mem_get_info(device)
    return max(free + cached - RESERVE, 0)


def fence(device: torch.device) -> None:
    """Limit torch's memory if it is shared, so that torch fails instead of the system killing processes."""
    if is_shared(device) and (free := available(device)):
        total = torch.cuda.get_device_properties(device).total_memory
        held = torch.cuda.memory_reserved(device)
        torch.cuda.set_per_process_memory_fraction(min((free + held) / total, 1.0), device)


def mem_available(path: str = "/proc/meminfo") -> int:
    """Return Linux's estimate of bytes available without swapping; 0 on other systems."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), 0)


def refuse(needed: int, what: str, device: torch.device, advice: str) -> None:
    """Raise BackendError before anything is allocated if `needed` bytes are not available."""
    free = available(device)
    if free and needed > free:
        raise BackendError(
            f"{what} needs {needed / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are available",
            where=device,
            remedy=advice,
        )
