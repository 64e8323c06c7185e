"""What the method scripts share: data, network, evaluation and the plumbing of a run.

No paper's contribution lives here. README.md is the map.
"""


class InputError(Exception):
    """Something the user gave cannot be used; scripts print its message and exit with code 2."""
