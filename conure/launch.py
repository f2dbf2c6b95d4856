"""How a script runs and ends: in how many processes, and what it says when its input is bad."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from conure import settings
from conure.errors import InputError, NothingToDo


def group_of(hyperparameters: Any) -> contextlib.AbstractContextManager:
    """Nothing, unless torchrun started several processes of a script that trains or scores."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or not hasattr(hyperparameters, "device"):
        return contextlib.nullcontext()
    from conure import processes  # only now, as it loads torch

    return processes.group(hyperparameters.device)


def run(main: Callable[[Any], int | None], block: type, about: str) -> NoReturn:
    """Runs a script's `main` with its hyperparameters and ends the process: 0, 2 for bad input, 130 for Ctrl-C.

    Ctrl-C during training does not come here: training takes it as the end of training.
    """
    sys.stdout.reconfigure(line_buffering=True)  # so that a log file or a pipe gets each line when it is printed
    try:
        hyperparameters = settings.from_command_line(block, about)
        with group_of(hyperparameters):
            code = main(hyperparameters)
        sys.exit(code or 0)
    except NothingToDo as done:
        if os.environ.get("RANK", "0") == "0":  # of the processes that torchrun started
            print(done)
        sys.exit(0)
    except BrokenPipeError:  # what read the output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        reason = (str(error) or "out of memory").splitlines()[0][:150]
        print(f"error: {reason}: lower --batch_size, --channels or --negative_fraction", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        print(
            "\ninterrupted: no checkpoint written; the same command goes on from the last snapshot, if any",
            file=sys.stderr,
        )
        sys.exit(130)
