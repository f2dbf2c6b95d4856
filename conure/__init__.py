"""The package that the scripts share. It is imported before torch, so what torch reads when it loads is set here."""

import os
import sys
from typing import Any

if sys.platform == "win32":
    print("error: this runs on Linux and macOS; on Windows, run it in WSL", file=sys.stderr)
    sys.exit(2)

# Huge pages (2 MB) for large arrays: at TTL's size, page faults of 4 kB pages take a tenth of a step.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

# How often an OpenMP thread spins at a barrier before it sleeps. With the default of 300,000, three concurrent runs on
# two cores take 1.8 s a step each; with 1,000 they take 0.04 s. A single run is as fast with either.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

# With this workspace cuBLAS sums in a fixed order.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

PACKAGES = ("torch", "numpy", "pandas", "tqdm")


def one_line(kind: type[BaseException], error: BaseException, *trace: Any) -> None:
    """Prints one line for what may end a program before `launch.run`: a missing package, or Ctrl-C."""
    if isinstance(error, ModuleNotFoundError) and error.name in PACKAGES:
        print(f"error: this Python has no {error.name}: run .venv/bin/python in place of python", file=sys.stderr)
        sys.exit(2)
    if not issubclass(kind, KeyboardInterrupt):
        return sys.__excepthook__(kind, error, *trace)
    print("\ninterrupted", file=sys.stderr)
    sys.exit(130)


sys.excepthook = one_line  # importing torch takes seconds, in which Ctrl-C may come
