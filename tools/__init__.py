"""Commands that use a trained chain, run as `python -m tools.NAME`; the packages hold what they are made of."""

import os

from conure.errors import InputError


def check_output(path: str, overwrite: bool, own: bool = False) -> None:
    """InputError if `path` exists, except with --overwrite or for the tool's `own` earlier output."""
    if os.path.exists(path) and not (overwrite or own):
        raise InputError(f"{path} exists: --overwrite replaces it")
