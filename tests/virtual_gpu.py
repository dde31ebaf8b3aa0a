"""How much less exact the GPU of a hosted macOS runner may be than an Apple GPU: SLACK, 1 anywhere else.

A virtual machine shows an "Apple Paravirtual device", which is of no GPU family that MLX was written for; others have
seen float32 models miss 1e-4 there. Metal promises exp to 4 units of the last place, rsqrt, division and tanh to 2 to 5;
in its fast forms, which such a device may use whatever is asked for, exp is off by 3 + 2 |x| units, 19 at the |x| of 8
that scores and gates have: 5 times as much, and an error may meet one more in the next layer's exp: 8 covers both.
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
