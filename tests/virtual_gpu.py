"""The error factor of a hosted macOS runner's GPU compared with an Apple GPU: SLACK, 1 on other machines.

A virtual machine shows an "Apple Paravirtual device", which belongs to no GPU family that MLX supports.
Others have observed errors of 1e-4 in float32 models there. Metal guarantees exp to 4 units of the last
place, rsqrt, division and tanh to 2 to 5. In its fast forms, which such a device may use in any case, exp has
an error of 3 + 2 |x| units, 19 at the |x| of 8 of scores and gates: 5 times as much. The next layer's exp may
add another error; 8 covers both.
"""

from __future__ import annotations

from importlib.util import find_spec

VIRTUAL = "Paravirtual"


def slack() -> float:
    if find_spec("mlx") is None:
        return 1.0
    import mlx.core as mx

    return 8.0 if VIRTUAL in str(mx.device_info().get("device_name")) else 1.0


SLACK = slack()
