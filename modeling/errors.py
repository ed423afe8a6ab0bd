"""TODO"""


class UserError(ValueError):
    """What a person asked for cannot be done: says what, where, both numbers, and what to do instead.

    The command line prints the message alone and exits 1; every other exception is a defect and keeps its
    traceback.
    """
