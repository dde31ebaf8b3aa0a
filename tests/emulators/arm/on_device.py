"""Runs on the emulated device: logits of tiny models on the cpu backend, dense and int4.

python on_device.py OUT.npz < {"llama": ["/a/folder", [3, 14, 15]], ...}       arrays are named llama-int4
"""

import json
import sys

import numpy as np
from decoding import decoder, logits  # the emulator's Python has tests/fixtures/ on its path

from tinychat_mlx.open import create

made = {}
for family, (folder, ids) in json.load(sys.stdin).items():
    for form in ("dense", "int4"):
        backend = create("cpu", exact=True, threads=2)
        made[f"{family}-{form}"] = logits(decoder(folder, backend, form == "int4"), ids, [len(ids)])
np.savez(sys.argv[1], **made)
