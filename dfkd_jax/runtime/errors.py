"""What a user did wrong, told apart from what this program does wrong.

A command shortens a `UserError` to its sentence. Every other exception keeps its type and its
traceback, as it is a defect of the program or of a network of one's own.
"""


class UserError(ValueError):
    """One sentence for the user: what is wrong, and what is allowed."""


class DataMissing(UserError, FileNotFoundError):
    """A data set that is not where it should be; says how to get it."""
