"""The one exception for everything a user can mend."""


class UserError(Exception):
    """A mistake in what the user gave: a config key, a file, an environment variable.

    Its text is one line that names what was given, the rule it breaks and the mend. The entries
    print that line once for the whole job, without a traceback, and exit with status 2.
    """


class RankError(UserError):
    """A mistake that one node or rank alone may see, such as in its environment."""
