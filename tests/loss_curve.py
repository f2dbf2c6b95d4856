"""Runs a script as usual and writes the loss of every step: loss_curve.py OUTPUT SCRIPT [--flag …]."""

import json
import os
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from conure.reporting import Progress

output, script = sys.argv[1:3]
sys.argv = sys.argv[2:]
curve, advance = [], Progress.advance


def note(progress, loss) -> None:
    curve.append(loss.item())
    advance(progress, loss)


Progress.advance = note
try:
    runpy.run_path(str(ROOT / script), run_name="__main__")
finally:
    if os.environ.get("RANK", "0") == "0":
        Path(output).write_text(json.dumps(curve))
