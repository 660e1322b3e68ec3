"""The one exception that tells users what to change."""


class InvalidInput(ValueError):
    """Input that cannot be worked with; the message is one sentence that names the fix."""
