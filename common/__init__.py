"""What the method scripts share: data, network, evaluation and the plumbing of a run. No paper's contribution lives here."""


class InputError(Exception):
    """Something the user gave cannot be used. Scripts print its message, one line, and exit with code 2."""
