"""The README's table of results: python -m benchmarks.movielens_table OUTPUT_DIR, after benchmarks/movielens.sh.

Reads the last checkpoint of every seed's folder and prints, for each task and stage, mean and standard deviation over
the seeds, on the test part and on the whole held-out part, which is what the original scores.
"""

import sys
from pathlib import Path

from conure import checkpoint

import numpy as np

# tests/reference/results_ml-1m-half.md: the original's last state; it has no score between pruning and retraining.
ORIGINAL = {
    (1, "tp"): "0.0560", (1, "ret"): "0.0670", (2, "tp"): "0.0046", (2, "ret"): "0.0051",
    (3, "tp"): "0.0123", (3, "ret"): "0.0133", (4, "tp"): "0.7227", (4, "ret"): "0.7188",
}  # fmt: skip
MOST_POPULAR = {1: "0.0071", 2: "0.0054", 3: "0.0109", 4: "0.7162"}


def main(output: str) -> None:
    paths = sorted(Path(output).glob("seed_*/ret_t4.pt"))
    records = [checkpoint.load(str(path))[0]["tasks"] for path in paths]
    print(f"| task | stage | test | held out | original, held out | most popular / majority |  ({len(paths)} seeds)")
    print("|---|---|---|---|---|---|")
    for task in (1, 2, 3, 4):
        for mode in ("tp", "pruned", "ret"):
            cells = []
            for split in ("test", "heldout"):
                scores = [next(iter(tasks[task]["results"][mode][split].values())) for tasks in records]
                cells.append(f"{np.mean(scores):.4f} ± {np.std(scores, ddof=1):.4f}")
            cells += [ORIGINAL.get((task, mode), ""), MOST_POPULAR[task] if mode == "tp" else ""]
            print(f"| {task} | {mode} |", " | ".join(cells), "|")


if __name__ == "__main__":
    main(sys.argv[1])
