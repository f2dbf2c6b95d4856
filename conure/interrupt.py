"""Ctrl-C during training: the first one ends it as if it had converged."""

import signal

from tqdm import tqdm


class StopRequest:
    """Records the first Ctrl-C, so that the step and the evaluation after it finish; the second one raises
    KeyboardInterrupt."""

    requested = False
    before = None  # the previous signal handler

    def listen(self) -> None:
        self.before = signal.signal(signal.SIGINT, self.note)

    def note(self, *_) -> None:
        self.requested = True
        self.end()

    def announce(self, epoch: float) -> None:
        tqdm.write(
            f"stopped by Ctrl-C after epoch {epoch:g}: the best weights so far become the stage's result (a second "
            "Ctrl-C leaves the stage unfinished: run it again to resume)"
        )

    def end(self) -> None:
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)
