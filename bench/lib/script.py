"""How a script of this folder ends where it was asked for something impossible."""

from __future__ import annotations

import sys
from collections.abc import Callable


def script(main: Callable[[], None]) -> None:
    """Call ``main``. A ValueError or OSError, such as a file that cannot be read, is one line and exit code 2."""
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"{sys.argv[0].rpartition('/')[2]}: {error}", file=sys.stderr)
        raise SystemExit(2) from error
