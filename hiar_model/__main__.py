"""`python -m hiar_model` is the command `hiar`."""

import sys

INTERRUPTED = 130


def run() -> int:
    """Run the command line and return its exit code; Ctrl-C is one line while the command is imported, too."""
    try:
        from .cli import main

        return main()
    except KeyboardInterrupt:
        print("hiar: interrupted", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(run())
