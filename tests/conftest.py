"""Tests import the modules from the project's root, and run the scripts there as a user does."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

FILES = {
    1: "original_desen_pretrain.csv",
    2: "original_desen_finetune_click_nouserID.csv",
    3: "original_desen_finetune_like_nouserID.csv",
    4: "original_desen_gender.csv",
}
STAGES = [(task, mode) for task in FILES for mode in ("tp", "ret")]


def flags(folder: Path, task: int) -> list[str]:
    """Where `folder` has the data (folder/Data) and the checkpoints (folder/checkpoints) of a test's chain."""
    data = folder / "Data"
    return [
        "--data_path", str(data / FILES[task]),
        "--index_path", str(data / "index.csv"),
        "--checkpoint_dir", str(folder / "checkpoints"),
        "--device", "cpu",
    ]  # fmt: skip


def run_script(name: str, *arguments: str) -> str:
    """Runs a script in a process of its own and returns what it printed; it must succeed."""
    return run_python(str(ROOT / name), *arguments)


def run_module(name: str, *arguments: str) -> str:
    """As run_script, for a tool."""
    return run_python("-m", name, *arguments)


def run_python(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def run_here(monkeypatch, capsys):
    """Runs a script or, as `python -m`, a module in this process: returns exit code, what it printed, and its errors."""

    def run(name: str, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        monkeypatch.setattr(sys.stdout, "reconfigure", lambda **_: None, raising=False)
        with pytest.raises(SystemExit) as end:
            if name.endswith(".py"):
                runpy.run_path(str(ROOT / name), run_name="__main__")
            else:
                runpy.run_module(name, run_name="__main__", alter_sys=True)
        return (end.value.code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def demo(tmp_path_factory) -> Path:
    """A folder with a small demo data set in Data/."""
    folder = tmp_path_factory.mktemp("demo")
    run_module("Data.make_demo", "--output_dir", str(folder / "Data"), "--users", "1500", "--length", "20")
    return folder


def chain_settings(task: int, mode: str) -> list[str]:
    """The hyperparameters of the tests' chain; some of them odd, so that a script that ignores them is found out."""
    if task == 1:
        shape = ["--channels", "32", "--dilations", "1,4"] if mode == "tp" else []
        return [*shape, "--epochs", "10" if mode == "tp" else "5", "--learning_rate", "3e-3"]
    odd = {(2, "tp"): ["--prune_ratio", "0.6"], (4, "tp"): ["--eval_every", "5"]}.get((task, mode), [])
    return ["--epochs", "6", "--batch_size", "128", "--learning_rate", "1e-3", *odd]


@pytest.fixture(scope="session")
def chain(demo) -> tuple[Path, dict[tuple[int, str], str]]:
    """The demo's folder after all eight scripts, and what each of them printed."""
    printed = {}
    for task, mode in STAGES:
        printed[task, mode] = run_script(f"conure_{mode}_t{task}.py", *flags(demo, task), *chain_settings(task, mode))
    return demo, printed
