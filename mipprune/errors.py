"""What can go wrong in a run besides its input."""

from solvers import InvalidInput


class Interrupted(InvalidInput):
    """The run cannot go on here and now; what it has done is kept."""


class OutOfMemory(Interrupted):
    """The device's memory does not suffice, even for the smallest piece."""
