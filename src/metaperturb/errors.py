"""The one exception that the command-line programs turn into a single line."""


class UserError(Exception):
    """Something the user can put right: a path, a setting, a file, a machine.

    The message is one line that says what was wrong, where, and what to do. The programs print it without a
    traceback (``--traceback`` shows one); library users catch it like any exception.
    """
