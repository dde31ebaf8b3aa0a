"""The backends of the package, by the names that options use. Imports nothing, so that a command line starts fast."""

from __future__ import annotations

BACKENDS = {  # name -> (module, class); a module may be absent from an installation
    "mlx": ("tinychat_mlx.backends.mlx.backend", "MlxBackend"),
    "cuda": ("tinychat_mlx.backends.cuda.backend", "CudaBackend"),
    "cpu": ("tinychat_mlx.backends.cpu.backend", "CpuBackend"),
    "reference": ("tinychat_mlx.backends.reference", "ReferenceBackend"),
}
