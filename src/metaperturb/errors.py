"""The exceptions that the command-line programs turn into a single line."""


class UserError(Exception):
    """Something the user can put right: a path, a setting, a file, a machine.

    The message is one line that says what was wrong, where, and what to do; of several things at once, a line each
    under a heading. The programs print it without a traceback (`--traceback` shows one); library users catch it like
    any exception.
    """

    exit_code = 1


class Diverged(UserError):
    """A training whose numbers are not finite any more: to try the same again is useless."""

    exit_code = 3  # 2 is argparse's


class Unavailable(UserError):
    """No fused kernel here; the message says why and what to do, in one line."""


class Damaged(UserError):
    """A file that does not hold what was written to it, or never held what is looked for."""


class NotFinite(UserError):
    """A network whose output, or whose statistics, have no meaning."""
