"""Python imports this when a test's child process starts: the errors that it makes are noted, too."""

import os
import sys

if os.environ.get("RAISED_SITES"):
    sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    try:
        import raise_sites
    except ImportError:  # a child that has no tinychat_mlx, or no click
        pass
    else:
        raise_sites.watch()
    finally:
        sys.path.pop()
