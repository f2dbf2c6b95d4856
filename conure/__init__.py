"""What the scripts share. Modules import from here before torch, so what must hold when torch loads is set here."""

import os
import sys
from typing import Any

if sys.platform == "win32":
    print("error: this runs on Linux and macOS; on Windows, run it in WSL", file=sys.stderr)
    sys.exit(2)

# Pages of 2 MB for large arrays: at TTL's size a tenth of a step is the making of pages of 4 kB.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

# Rounds that torch's threads spin before they sleep when they wait for each other. With the default, 300,000, three
# runs at once on two cores take 1.8 s a step each, with 1,000 they take 0.04 s; one alone is as fast with either.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def one_line_for_ctrl_c(kind: type[BaseException], *error: Any) -> None:
    """What an uncaught Ctrl-C prints: one that comes before `launch.run`, which answers it from then on."""
    if not issubclass(kind, KeyboardInterrupt):
        return sys.__excepthook__(kind, *error)
    print("\ninterrupted", file=sys.stderr)
    sys.exit(130)


sys.excepthook = one_line_for_ctrl_c  # importing torch takes seconds
