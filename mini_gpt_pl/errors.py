"""The one error type that the command line shows as a single line."""


class UserError(Exception):
    """Something the user can put right: the message says what is wrong, where, and what to do.

    The command line prints the message alone and exits with status 2; a traceback would hide the remedy.
    """
