"""How a script starts and ends: processes, exit codes, and one line for bad input."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from conure import settings
from conure.errors import InputError, NothingToDo

TORCHRUN = ("TORCHELASTIC_RUN_ID", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
NEEDS_MEMORY = ("batch_size", "channels", "negative_fraction")  # fields to lower if memory is short
OUT_OF_MEMORY = ("DefaultCPUAllocator: ", "CUDA error: out of memory")  # in messages of plain RuntimeErrors


def by_torchrun() -> bool:
    """Whether torchrun started this process: all of its variables are set, as one or two may be left over."""
    return all(name in os.environ for name in TORCHRUN)


def group_of(hyperparameters: Any) -> contextlib.AbstractContextManager:
    """The process group, if torchrun started several processes of a script that trains or scores."""
    if not by_torchrun() or os.environ["WORLD_SIZE"] == "1" or not hasattr(hyperparameters, "device"):
        return contextlib.nullcontext()
    from conure import processes  # here, as it imports torch

    return processes.group(hyperparameters.device)


def is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError):
        return True
    import torch  # here, as some programs do without it

    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in OUT_OF_MEMORY)


def run(main: Callable[[Any], int | None], block: type, about: str) -> NoReturn:
    """Runs a script's `main` with its settings and exits: 0, 2 for bad input, 130 for Ctrl-C.

    Training handles Ctrl-C itself, as the end of training.
    """
    # Logs and pipes get each line at once; characters that the encoding lacks are printed like \u2026.
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    try:
        hyperparameters = settings.from_command_line(block, about)
        with group_of(hyperparameters):
            code = main(hyperparameters)
        sys.exit(code or 0)
    except NothingToDo as done:
        if not by_torchrun() or os.environ["RANK"] == "0":
            print(done)
        sys.exit(0)
    except BrokenPipeError:  # the reader of the output, such as `head`, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = (str(error) or "out of memory").splitlines()[0][:150]
        lower = [f"--{name}" for name in NEEDS_MEMORY if hasattr(block, name)]
        print(f"error: {reason}{': lower ' if lower else ''}{' or '.join(lower)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        print(
            "\ninterrupted: no checkpoint written; run the same command to resume from the last snapshot, if any",
            file=sys.stderr,
        )
        sys.exit(130)
