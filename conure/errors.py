"""How a run ends before its work is done."""


class InputError(Exception):
    """Something the user gave cannot be used; the message says what, where and what to do, in one line."""


class NothingToDo(Exception):
    """What was asked for is done already; the message says so."""
