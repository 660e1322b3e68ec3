"""The exceptions that tell users what to change."""


class InvalidInput(ValueError):
    """Input that cannot be worked with; the message is one sentence that names the fix."""


class NoMask(InvalidInput):
    """The fixed weights leave no allowed mask: an oracle's answer, not a caller's mistake."""
