"""python -m tinychat_mlx: the same as `tinychat`."""

from __future__ import annotations

import sys

from tinychat_mlx.apps.cli import main

sys.exit(main())
