"""What is built on the chain: commands, and rooms for what stands behind them."""

import os

from conure.errors import InputError


def check_output(path: str, overwrite: bool, own: bool = False) -> None:
    """InputError if something stands at `path` which the tool did not write (`own`) and may not replace."""
    if os.path.exists(path) and not (overwrite or own):
        raise InputError(f"{path} exists: --overwrite replaces it")
