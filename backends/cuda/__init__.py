"""NVIDIA GPUs through torch: a PC's card or a Jetson. The only package that imports torch."""

from __future__ import annotations

import os

try:
    import torch
except ImportError as e:
    raise ImportError(f"torch cannot be imported ({e}): pip install tinychat-mlx[cuda]") from None

from tinychat_mlx.backend import Device
from tinychat_mlx.backends.cuda import device as devices
from tinychat_mlx.backends.cuda.torch_ops import TorchBackend
from tinychat_mlx.errors import BackendError

KV = "TINYCHAT_CUDA_KV"  # fp16 (default) or int8: what the KV cache is stored in


class CudaBackend(TorchBackend):
    """fp16 on a GPU. TINYCHAT_CUDA_DEVICE=cpu: float32 on CPU tensors, for tests."""

    name = "cuda"

    def __init__(
        self, exact: bool = False, threads: int | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """exact: the KV cache is never int8. threads: torch's on CPU tensors. dtype: tests choose it.

        Raises BackendError when there is no usable device.
        """
        device = devices.find()
        kv = os.environ.get(KV, "fp16")
        if kv not in ("fp16", "int8"):
            raise BackendError(f"{KV} must be fp16 or int8, not {kv!r}")
        if threads and device.type == "cpu":
            torch.set_num_threads(threads)
        chosen = dtype or (torch.float16 if device.type == "cuda" else torch.float32)
        super().__init__(device, chosen, kv == "int8" and not exact)

    def describe(self) -> Device:
        kind = str(self.dtype).removeprefix("torch.")
        kv = "int8" if self.int8_kv else kind
        if self.device.type == "cpu":
            note = f"CPU tensors for testing ({devices.ENVIRONMENT}=cpu), pure torch, {kind}, KV {kv}"
            return Device(self.name, "CPU", f"torch {torch.__version__}: {note}")
        p = torch.cuda.get_device_properties(self.device)
        memory = "shared memory" if devices.is_shared(self.device) else "memory"
        detail = f"sm_{p.major}{p.minor}, {p.total_memory / 2**30:.1f} GiB {memory}, {kind}, KV {kv}"
        return Device(self.name, p.name, f"{detail}, torch {torch.__version__} (CUDA {torch.version.cuda})")
