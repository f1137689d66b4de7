"""The one exception of the layers above the ops that means "the user can fix this"."""


class UserError(ValueError):
    """A mistake the user can repair: one line that names the thing, what was expected and the remedy.

    The command line prints the line and exits with status 2; in Python it is an ordinary ValueError.
    """
