"""What the method scripts share: data, network, evaluation and the plumbing of a run.

No paper's contribution lives here. README.md is the map.
"""

import os
import sys


class InputError(Exception):
    """Something the user gave cannot be used; scripts print its message and exit with code 2."""


def note(text: str) -> None:
    """Print what the user did not ask for, on the first process."""
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {text}", file=sys.stderr)
