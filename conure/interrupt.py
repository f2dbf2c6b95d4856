"""What Ctrl-C does to training: it ends it, as if it had converged."""

import signal

from tqdm import tqdm


class StopRequest:
    """Notes the first Ctrl-C instead of raising it, so that it cuts neither a step nor what follows in two; the second
    one raises as usual."""

    requested = False
    before = None  # what Ctrl-C did before

    def listen(self) -> None:
        self.before = signal.signal(signal.SIGINT, self.note)

    def note(self, *_) -> None:
        self.requested = True
        self.end()

    def announce(self, epoch: float) -> None:
        tqdm.write(
            f"stopped by Ctrl-C after epoch {epoch:g}: the best state so far is kept as the stage's result (a second "
            "Ctrl-C leaves the stage unfinished, to resume later)"
        )

    def end(self) -> None:
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)
