"""Exceptions that end a run early, without a traceback."""


class InputError(Exception):
    """The user's input cannot be used. The message says in one line what is wrong, where, and what to do."""


class NothingToDo(Exception):
    """The work is already done; the message says so."""
