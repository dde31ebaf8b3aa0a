"""python -m tinychat_mlx.convert SRC -o DST: the same as `tinychat convert`."""

from __future__ import annotations

import sys

from tinychat_mlx.apps.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
