"""Fixtures: tests import modules from the project's root and run the scripts there, as a user does."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data_loader  # noqa: E402  from the project's root
from data_loader import Batch  # noqa: E402

FILES = {
    1: "original_desen_pretrain.csv",
    2: "original_desen_finetune_click_nouserID.csv",
    3: "original_desen_finetune_like_nouserID.csv",
    4: "original_desen_gender.csv",
}
SLOW = ("test_readme", "test_scripts", "test_soak", "test_tools")  # so are tests that need the demo data or a chain
STAGES = [(task, mode) for task in FILES for mode in ("tp", "ret")]
PROGRAMS = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for pattern in ("*.py", "tools/**/*.py", "Data/*.py", "benchmarks/*.py")
    for path in sorted(ROOT.glob(pattern))
    if "launch.run(" in path.read_text()
]


def flags(folder: Path, task: int) -> list[str]:
    """Flags for a chain with its data in folder/Data and its checkpoints in folder/checkpoints."""
    data = ["--data_path", str(folder / "Data" / FILES[task]), "--index_path", str(folder / "Data" / "index.csv")]
    return [*data, "--checkpoint_dir", str(folder / "checkpoints"), "--device", "cpu"]


def batch_of(inputs: Tensor, targets: Tensor) -> Batch:
    """A batch (B, T), (B,) in which each example has a row of its own."""
    return Batch(np.arange(len(inputs)), inputs, torch.arange(len(inputs)), targets)


def run_python(*arguments: str, **environment: str) -> str:
    """Runs Python in a new process at the project's root and returns its output; it must succeed."""
    environment = os.environ | environment
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def run_here(monkeypatch, capsys):
    """Runs a script, or a module as `python -m` does, in this process; returns exit code, stdout and stderr."""

    def run(name: str, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        monkeypatch.setattr(sys.stdout, "reconfigure", lambda **_: None, raising=False)
        module = partial(runpy.run_module, alter_sys=True)
        start, place = (runpy.run_path, str(ROOT / name)) if name.endswith(".py") else (module, name)
        with pytest.raises(SystemExit) as end:
            start(place, run_name="__main__")
        return (end.value.code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def made_once(tmp_path_factory) -> Callable[[str, Callable[[Path], None]], Path]:
    """Makes a folder with `make`, once for all processes that run tests."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def made(name: str, make: Callable[[Path], None]) -> Path:
        with FileLock(shared / f"{name}.lock"):
            if not (shared / f"{name}.done").exists():
                make(shared / name)
                (shared / f"{name}.done").touch()
        return shared / name

    return made


def make_demo(folder: Path, users: int = 1500) -> None:
    run_python("-m", "Data.make_demo", "--output_dir", str(folder / "Data"), "--users", str(users), "--length", "20")


@pytest.fixture(scope="session")
def demo(made_once) -> Path:
    """A folder with a small demo data set in Data/; read-only for tests."""
    return made_once("demo", make_demo)


def chain_settings(task: int, mode: str) -> list[str]:
    """The hyperparameters of the tests' chain; some are unusual, to detect a script that ignores them."""
    if task == 1:
        shape = ["--channels", "32", "--dilations", "1,4", "--tied", "yes"] if mode == "tp" else []
        return [*shape, "--epochs", "10" if mode == "tp" else "5", "--learning_rate", "3e-3"]
    odd = {(2, "tp"): ["--prune_ratio", "0.6"], (4, "tp"): ["--eval_every", "5"]}.get((task, mode), [])
    return ["--epochs", "6", "--batch_size", "128", "--learning_rate", "1e-3", *odd]


def make_chain(folder: Path) -> None:
    make_demo(folder)
    printed = {}
    for task, mode in STAGES:
        settings = chain_settings(task, mode)
        printed[f"{mode}{task}"] = run_python(f"conure_{mode}_t{task}.py", *flags(folder, task), *settings)
    (folder / "printed.json").write_text(json.dumps(printed))


@pytest.fixture(scope="session")
def chain(made_once) -> tuple[Path, dict[tuple[int, str], str]]:
    """The demo's folder after all eight scripts, read-only for tests, and the output of each script."""
    folder = made_once("chain", make_chain)
    printed = json.loads((folder / "printed.json").read_text())
    return folder, {(task, mode): printed[f"{mode}{task}"] for task, mode in STAGES}


@pytest.fixture
def chain_copy(chain, tmp_path) -> Path:
    """A copy of the finished chain, which the test may change."""
    return Path(shutil.copytree(chain[0], tmp_path / "copy"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests that `--fast` skips, and runs the longest files first, so that all cores finish together."""
    items.sort(key=lambda item: item.module.__name__ not in SLOW)
    for item in items:
        if item.module.__name__ in SLOW or {"demo", "chain"} & set(item.fixturenames):
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def tiny(tmp_path) -> tuple[data_loader.TaskData, data_loader.TaskData]:
    """Data of task 1 and of a later task, with padding, repeats and an unknown item."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "1.csv").write_text("0,0,a,b,c\na,b,c,a,b\n0,c,b,a,c\nb,a,c,a,b\n0,0,0,b,a\na,a,b,c,c\n")
    (folder / "2.csv").write_text("0,a,b,b,,x,y,z\na,b,c,new,,x\n0,0,c,a,,y,z,x\n0,0,0,b,,z\n0,c,b,c,,y,x\n")
    first = data_loader.load_sequences(str(folder / "1.csv"), data_loader.Split(0.4))
    return first, data_loader.load_examples(str(folder / "2.csv"), data_loader.Split(0.3), first.items)
