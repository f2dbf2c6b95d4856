"""The soak test: kills, corrupted files, malformed rows, full disks, forgetting, memory. `python tests/soak.py`

Prints one line per part, such as `SOAK part=kills tried=50 lost=0`, and exits with 1 if one fails. `python
tests/soak.py rows memory` runs these parts alone; tests/test_soak.py runs a short form of all. The part "forgetting"
needs task files in the TTL format, such as MovieLens, in the folder that the environment variable CONURE_DATA names.
"""

import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from conure import checkpoint, line_reader
from conure.errors import InputError
from conure.vocabulary import Vocabulary

from conftest import FILES, STAGES, flags, make_demo

import data_loader
from pruning import Stage

DATA = Path(os.environ.get("CONURE_DATA", ""))
AGE = "original_desen_age.csv"  # data of the fifth task


def command(folder: Path, task: int, mode: str, epochs: int) -> list[str]:
    """The command of a small stage with frequent evaluations and snapshots."""
    small = ["--channels", "64", "--dilations", "1,4"] if (task, mode) == (1, "tp") else []
    often = ["--eval_every", "7", "--snapshot_minutes", "0.002", "--epochs", str(epochs), "--batch_size", "64"]
    return [sys.executable, str(ROOT / f"conure_{mode}_t{task}.py"), *flags(folder, task), *small, *often]


def run_chain(folder: Path, epochs: int = 1) -> None:
    for task, mode in STAGES:
        subprocess.run(command(folder, task, mode, epochs), check=True, stdout=subprocess.DEVNULL)


def without_times(value: Any) -> Any:
    """A checkpoint's content without what differs between two runs: times, folders, and digests of these."""
    if isinstance(value, dict):
        names = ("seconds", "data_path", "lineage", "checkpoint before", "hyperparameters")
        return {name: without_times(part) for name, part in value.items() if name not in names}
    return value.tolist() if isinstance(value, torch.Tensor) else value


def differences(ours: Path, theirs: Path) -> int:
    """The number of checkpoints of two chains that are not bit-identical, and of rows of results.csv that differ."""
    count = 0
    for task, mode in STAGES:
        paths = (checkpoint.path_of(str(folder / "checkpoints"), Stage(task, mode)) for folder in (ours, theirs))
        one, other = (without_times(checkpoint.load(path)[0]) for path in paths)
        count += one != other
    tables = [pd.read_csv(folder / "checkpoints" / "results.csv", dtype=str).fillna("") for folder in (ours, theirs)]
    rows = [table.drop(columns="seconds").to_csv().splitlines() for table in tables]
    return count + sum(a != b for a, b in zip(*rows)) + abs(len(rows[0]) - len(rows[1]))


def killed(process: subprocess.Popen, snapshot: Path, dice: random.Random) -> bool:
    """Kills the process: one time in four at a random moment of its first seconds, else shortly after a snapshot.

    False if it ended before.
    """

    def written() -> float:
        try:
            return snapshot.stat().st_mtime
        except FileNotFoundError:
            return 0

    before, until = written(), time.monotonic() + dice.uniform(0, 4)
    if dice.random() < 0.25:
        while process.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
    else:
        while process.poll() is None and written() in (before, 0):
            time.sleep(0.001)
        time.sleep(dice.uniform(0, 0.1))
    process.kill()
    return process.wait() != 0


def kills(folder: Path, tried: int, epochs: int) -> dict[str, int]:
    """`kill -9` at random moments of all eight stages; then the chain is compared with an uninterrupted one."""
    dice = random.Random(1)
    make_demo(folder / "whole", users=400)
    shutil.copytree(folder / "whole", folder / "killed")
    run_chain(folder / "whole", epochs)
    left = tried
    for number, (task, mode) in enumerate(STAGES):
        again = command(folder / "killed", task, mode, epochs)
        snapshot = folder / "killed" / "checkpoints" / f"{mode}_t{task}.snapshot.pt"
        for _ in range(left // (len(STAGES) - number)):
            if not killed(subprocess.Popen(again, stdout=subprocess.DEVNULL), snapshot, dice):
                break  # the stage is finished; later ones take over the kills that are left
            left -= 1
        subprocess.run(again, check=True, stdout=subprocess.DEVNULL)
    leftover = [path for path in (folder / "killed" / "checkpoints").iterdir() if "snapshot" in path.name]
    return {"tried": tried - left, "lost": differences(folder / "whole", folder / "killed") + len(leftover)}


def damage(path: Path, others: list[Path], dice: random.Random) -> None:
    """Flips a bit, truncates the file, or replaces it by that of another stage."""
    content = bytearray(path.read_bytes())
    kind = dice.randrange(3)
    if kind == 0:
        content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    elif kind == 1:
        del content[dice.randrange(len(content)) :]
    else:
        content = bytearray(dice.choice([other for other in others if other != path]).read_bytes())
    path.write_bytes(content)


def corruption(folder: Path, tried: int) -> dict[str, int]:
    """Damaged checkpoints and snapshots must be detected. The snapshots are left by killed stages."""
    dice = random.Random(2)
    make_demo(folder, users=300)
    run_chain(folder)
    for task, mode in ((1, "tp"), (4, "ret")):
        snapshot = folder / "checkpoints" / f"{mode}_t{task}.snapshot.pt"
        process = subprocess.Popen([*command(folder, task, mode, 1000), "--overwrite"], stdout=subprocess.DEVNULL)
        while not snapshot.exists():
            time.sleep(0.01)
        process.kill()
        process.wait()
    files = sorted((folder / "checkpoints").glob("*.pt"))
    detected = 0
    for _ in range(tried):
        path = dice.choice(files)
        whole = path.read_bytes()
        damage(path, files, dice)
        try:
            if "snapshot" in path.name:
                checkpoint.load_file(str(path), "")
            else:
                checkpoint.load(str(path))
        except InputError:
            detected += 1
        path.write_bytes(whole)
    return {"tried": tried, "detected": detected, "loaded": tried - detected}


def read_plainly(content: bytes) -> list[tuple[list[str], list[str]]] | int:
    """A plain parser of a later task: lines as (sequence, targets), or the number of the first malformed line."""
    lines, wrong = [], []
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        try:
            text = line.decode().strip(" \t\r")
        except UnicodeDecodeError:
            wrong.append(number)
            continue
        tokens = [token.strip(" \t\r") for token in text.split(",")]
        control = any(ord(character) < 32 for token in tokens for character in token)
        if control or any(len(token.encode()) > line_reader.MAX_TOKEN_BYTES for token in tokens):
            wrong.append(number)
        elif tokens != [""]:
            tokens = tokens[:-1] if tokens[-1] == "" else tokens
            middle = tokens.index("") if "" in tokens else 0
            if not 0 < middle < len(tokens) - 1 or "" in tokens[middle + 1 :]:
                wrong.append(number)
            lines.append((tokens[:middle], tokens[middle + 1 :]))
    return wrong[0] if wrong else lines


def rows(folder: Path, tried: int) -> dict[str, int]:
    """Mutated data files must be read as by a plain parser, or refused with file and line."""
    dice, wrong, chunk_bytes = random.Random(3), 0, line_reader.CHUNK_BYTES
    pieces = [b",", b",,", b"\n", b"\r\n", b" ", b"\t", b"\xff", b"\0", b"\x1b", b'"', b"\r", b"\xef\xbb\xbf"]
    pieces += [b"0", b"abc", "ä€".encode(), b"x" * 300, b"1,2,,3", b"<UNK>", b"longer than eight"]
    path = folder / "rows.csv"
    for _ in range(tried):
        content = b"".join(b"1,22,a b,,3,4444444444\n" for _ in range(dice.randrange(12, 20))) + b"5,,6"
        for _ in range(dice.randrange(1, 4)):
            start = dice.randrange(len(content))
            content = content[:start] + dice.choice(pieces) + content[start + dice.choice((0, 0, 1, 5)) :]
        path.write_bytes(content)
        expected = read_plainly(content)
        try:
            known = {token for line in expected for token in line[0]} - {"<UNK>"}
            items = Vocabulary(["<UNK>", *sorted(known)])
        except TypeError:
            items = Vocabulary()
        line_reader.CHUNK_BYTES = dice.choice((40, chunk_bytes))
        try:
            data = data_loader.load_examples(str(path), data_loader.Split(0.2), items)
            read = []
            for user, row in enumerate(data.rows[:, :-1]):
                sequence = [items.tokens[id] for id in row]
                targets = [data.target_vocabulary.tokens[id] for id in data.targets[data.users == user]]
                read.append((sequence, targets))
            width = max(len(line[0]) for line in expected)
            padding = items.tokens[items.ids.get("0", 0)]
            right = read == [([padding] * (width - len(line[0])) + line[0], line[1]) for line in expected]
        except InputError as error:
            right = isinstance(expected, int) and f"{path}, line " in str(error)
        wrong += not right
    line_reader.CHUNK_BYTES = chunk_bytes
    return {"tried": tried, "wrong": wrong}


def disk_full(folder: Path, stages: list[tuple[int, str]]) -> dict[str, int]:
    """Redoes every stage with a limit on file size: it must report the failed write and change no checkpoint."""
    make_demo(folder, users=300)
    run_chain(folder)
    harmed = 0
    for task, mode in stages:
        kept = {path: path.read_bytes() for path in (folder / "checkpoints").glob("*.pt")}
        limit = [len(kept[folder / "checkpoints" / f"{mode}_t{task}.pt"]) // 2] * 2
        limited = partial(resource.setrlimit, resource.RLIMIT_FSIZE, limit)
        again = [*command(folder, task, mode, 1), "--overwrite"]
        done = subprocess.run(again, capture_output=True, text=True, preexec_fn=limited)
        told = done.returncode == 2 and "could not be written" in done.stderr and done.stderr.count("\n") == 1
        now = {path: path.read_bytes() for path in (folder / "checkpoints").glob("*.pt")}
        checkpoint.load(str(folder / "checkpoints" / f"{mode}_t{task}.pt"))
        harmed += not told or now != kept
    return {"tried": len(stages), "harmed": harmed}


def forgetting(folder: Path, users: int) -> dict[str, int]:
    """Learns four tasks and a fifth, age, by copies of task 4's scripts; compares all scores after each stage."""
    suite = folder / "suite"
    ignored = shutil.ignore_patterns(".*", "Session", "checkpoints", "tests")
    shutil.copytree(ROOT, suite, ignore=ignored)
    for mode in ("tp", "ret"):
        text = (suite / f"conure_{mode}_t4.py").read_text().replace("gender", "age").replace("Stage(4", "Stage(5")
        (suite / f"conure_{mode}_t5.py").write_text(text)
    data, files = folder / "Data", {**FILES, 5: AGE}
    data.mkdir()
    for name in files.values():
        lines = (DATA / name).read_text().splitlines(keepends=True)[:users]
        (data / name).write_text("".join(lines))
    learned, compared, changed = {}, 0, 0
    for task, mode in [*STAGES, (5, "tp"), (5, "ret")]:
        shape = ["--channels", "32", "--dilations", "1,4"] if (task, mode) == (1, "tp") else []
        where = [*flags(folder, 4)[2:], "--data_path", str(data / files[task])]
        script = [sys.executable, str(suite / f"conure_{mode}_t{task}.py"), *where, "--epochs", "2", *shape]
        subprocess.run(script, check=True, stdout=subprocess.DEVNULL)
        content, _ = checkpoint.load(checkpoint.path_of(str(folder / "checkpoints"), Stage(task, mode)))
        model, items = checkpoint.build_model(content), Vocabulary.from_tensor(content["items"])
        examples = data_loader.load_examples(str(data / files[4]), data_loader.Split(0.5), items)
        inputs = examples.batch(np.arange(200)).inputs
        for earlier in range(1, task + 1):
            with torch.no_grad():
                scores = model.scores(inputs, Stage(earlier, "inference"))
            if earlier < task:
                compared += 1
                changed += not torch.equal(scores, learned[earlier])
            learned[earlier] = scores
    return {"compared": compared, "changed": changed}


def memory(folder: Path, epochs: int) -> dict[str, int]:
    """Growth of the resident memory in a long run, from the end of its second epoch to the end of its last."""
    make_demo(folder, users=2000)
    arguments = ["--channels", "32", "--dilations", "1,4", "--epochs", str(epochs), "--snapshot_minutes", "0.02"]
    script = [sys.executable, str(ROOT / "conure_tp_t1.py"), *flags(folder, 1), *arguments]
    process = subprocess.Popen(script, stdout=subprocess.PIPE, text=True)
    resident = []
    for line in process.stdout:
        if line.startswith("RESULT") and "state=tp split=validation" in line:
            pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
            resident.append(pages * os.sysconf("SC_PAGE_SIZE") // 1_000_000)
    assert process.wait() == 0
    second, *later = resident[2:]
    return {"epochs": epochs, "mb_epoch_2": second, "mb_last": later[-1], "growth_mb": max(later) - second}


PARTS: dict[str, tuple[Callable[..., dict[str, int]], tuple]] = {
    "kills": (kills, (50, 12)),
    "corruption": (corruption, (300,)),
    "rows": (rows, (2000,)),
    "disk_full": (disk_full, (STAGES,)),
    "forgetting": (forgetting, (3000,)),
    "memory": (memory, (40,)),
}
# Counts that must be 0, and the tolerated growth of memory.
BROKEN = ("lost", "loaded", "wrong", "harmed", "changed")
WAVERING_MB = 8


def missing(part: str) -> str:
    """Why a part has to be skipped; empty if it can run."""
    if part == "forgetting" and not (DATA / AGE).exists():
        return f"CONURE_DATA names no folder with task files in the TTL format, {AGE} among them"
    return ""


def kept(counts: dict[str, int]) -> bool:
    """Whether a part passed."""
    return not any(counts.get(name) for name in BROKEN) and counts.get("growth_mb", 0) <= WAVERING_MB


if __name__ == "__main__":
    broken = 0
    for name in sys.argv[1:] or PARTS:
        part, arguments = PARTS[name]
        if reason := missing(name):
            print(f"SOAK part={name} skipped: {reason}", flush=True)
            continue
        with tempfile.TemporaryDirectory() as folder:
            counts = part(Path(folder), *arguments)
        broken += not kept(counts)
        print(f"SOAK part={name}", *(f"{key}={value}" for key, value in counts.items()), flush=True)
    sys.exit(1 if broken else 0)
