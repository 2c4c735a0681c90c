"""The one exception for a user's mistake.

Entry points print it as one line and exit with code 2; everything else is a bug and keeps its traceback.
"""


class InputError(ValueError):
    """Bad input; the message is one line: the file or field, what was found and expected, the way out."""
