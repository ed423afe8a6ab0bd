"""UserError: the exception for what a user can correct, as opposed to a defect of Trifold."""


class UserError(ValueError):
    """A request that cannot be carried out. Its message says what, where, both values, and what to do.

    The command line prints the message alone and exits 1; every other exception is a defect and keeps its
    traceback.
    """
