"""What the method scripts share: data, network, evaluation and the plumbing of a run.

README.md is the map.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


class InputError(Exception):
    """Something the user gave cannot be used; scripts print its message and exit with code 2."""


def lacks_memory(error: BaseException) -> bool:
    """Whether an error says that memory, of the GPU or of the machine, does not suffice."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # PyTorch reports a lack of main memory as a plain RuntimeError.
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a full disk or a forbidden folder into an InputError that names the file or folder."""
    try:
        yield
    except OSError as error:
        place = error.filename or path
        raise InputError(f"cannot write to {place}: {error.strerror or error}") from None


def note(text: str) -> None:
    """Print what the user did not ask for, on the first process."""
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {text}", file=sys.stderr)
