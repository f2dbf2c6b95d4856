"""Runs every command of README and docs/, in order, in a copy of the project, with small settings."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

from conure import checkpoint
from conure.vocabulary import Vocabulary

import pytest
import torch
from conftest import ROOT

import data_loader
from pruning import Stage

COMMAND = r"(?:bash|rm|awk|python3|(?:[A-Z_]+=\S+ )*bash|\.venv/bin/\w+) .*"
TINY = "--first_epochs 1 --first_ret_epochs 1 --epochs 1 --ret_epochs 1 --channels 8 --dilations 1 --seeds 1"
APART = "--checkpoint_dir apart --index_path apart/index.csv --epochs 1 --channels 8 --dilations 1"

# Commands that are run with further flags, which make them short; the demo replaces the data that they name.
SHORTER = {
    "bash run_all.sh --full": "",  # after the settings at the top of the scripts were made small
    ".venv/bin/python conure_tp_t1.py": APART,
    '.venv/bin/python -m Data.from_interactions --interactions table.csv --task "click=later"': (
        "--min_rows 2 --history 0.5 --output_dir apart/Data"
    ),
    ".venv/bin/python -m tools.baselines --data_dir DATA_DIR --only Conure": TINY,
    ".venv/bin/python -m tools.baselines --data_dir DATA_DIR --later_test_fraction 0.9 --only SinMo --only Conure": (
        f"{TINY} --output_dir checkpoints/tenth"
    ),
    ".venv/bin/python -m tools.baselines --data_dir DATA_DIR": f"{TINY} --only FineHead",
    ".venv/bin/python -m tools.capacity --data_dir DATA_DIR --percents 50,70,90 --seeds 3": f"{TINY} --depths 1,2",
    ".venv/bin/torchrun --nproc_per_node=2 conure_tp_t1.py": f"{APART} --overwrite",
    ".venv/bin/python -m benchmarks.train_step --compare": "--items 9 --channels 8 --dilations 1 --steps 1",
}
ELSEWHERE = {
    "bash benchmarks/gpu.sh --log FILE": "needs a GPU; tests/test_gpu.py runs it with tiny sizes",
    "bash benchmarks/growth.sh": "takes minutes; `benchmarks.train_step` alone runs here",
    "bash run_tests.sh": "runs this test",
    "CONURE_REFERENCE=folder bash run_tests.sh": "is this, with more references",
    ".venv/bin/python tests/soak.py": "test_soak.py runs every part of it",
    ".venv/bin/python conure_tp_t5.py": "test_a_task_is_added_as_the_page_says runs it",
    ".venv/bin/python conure_ret_t5.py": "so does it this one",
    "python3 -m venv .venv && .venv/bin/pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu": (
        "takes the network; the version is checked below"
    ),
}


def commands(text: str) -> list[str]:
    """The commands of a page in order: lines of code blocks, and inline code."""
    found = []
    for block, span in re.findall(r"^```\n(.*?)^```$|`([^`\n]+)`", text, re.MULTILINE | re.DOTALL):
        found += [line for line in (block.splitlines() or [span]) if re.fullmatch(COMMAND, line)]
    return list(dict.fromkeys(found))


PAGES = "\n".join(path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))))


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """The project's files in a folder of their own."""
    folder = tmp_path_factory.mktemp("readme") / "project"
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    (folder / ".venv").symlink_to(Path(sys.executable).parents[1])
    (folder / "table.csv").write_text("user_id,item_id,timestamp\n1,5,0\n1,7,1\n2,9,0\n2,8,1\n")  # of both pages
    (folder / "ml-1m").mkdir()  # as the README's awk reads it
    (folder / "ml-1m" / "ratings.dat").write_text("1::1193::5::978300760\n3000::661::3::978302109\n")
    return folder


def run(folder: Path, command: str) -> str:
    done = subprocess.run(["bash", "-euc", command], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def test_every_exception_names_a_command_of_the_pages():
    assert {*SHORTER, *ELSEWHERE} <= set(commands(PAGES))
    pinned = (ROOT / "requirements.txt").read_text().splitlines()[0]
    assert all(version == pinned for version in re.findall(r"torch==[\d.]+", PAGES))


@pytest.mark.parametrize("command", [command for command in commands(PAGES) if command not in ELSEWHERE])
def test_a_command(copy, command):
    if command == "bash run_all.sh --full":
        shrink(copy)
    short = f"{command} {SHORTER.get(command, '')}"
    output = run(copy, short.replace("DATA_DIR", "Data/Session"))
    if "tools.recommend" in command and "today" in command:
        lines = (copy / "tomorrow.csv").read_text().splitlines()
        assert {line.split(",")[0] for line in lines} == {"user", "1", "2"}
    if command.startswith("awk -F::"):
        assert output == "1::1193::5::978300760\n"
    if command == "bash run_all.sh":
        assert output.count("\n== python conure_") == 8 and "nothing forgotten" in output


def test_a_task_is_added_as_the_page_says(copy):
    """Of classes, then of items, by no other edits than the page names, on the chain that the commands above left."""
    run(copy, "cd Data/Session; cp original_desen_finetune_like_nouserID.csv original_desen_shares.csv")
    copies = "\n".join(re.findall(r"^cp .+$", PAGES, re.MULTILINE))
    for task, like, data in ((5, 4, "age"), (6, 3, "shares")):
        path = f'data_path: str = "Data/Session/original_desen_{data}.csv"'
        run(copy, copies.replace("_t5", f"_t{task}").replace("_t4", f"_t{like}"))
        for mode in ("tp", "ret"):
            script = copy / f"conure_{mode}_t{task}.py"
            text = edited(script.read_text(), r'data_path: str = "[^"]*"', path)
            text = edited(text, rf'Stage\({like}, "{mode}"\)', f'Stage({task}, "{mode}")')
            script.write_text(edited(text, r'\A"""[^"]*"""', f'"""Learns {data}."""'))
            run(copy, f".venv/bin/python {script.name}")
        assert_learned(copy, task)


def edited(text: str, old: str, new: str) -> str:
    """The text with the pattern `old`, which must match once, replaced by `new`."""
    text, places = re.subn(old, new, text)
    assert places == 1, old
    return text


def shrink(copy: Path) -> None:
    """Edits the settings blocks of the scripts, as a user does, and removes data and checkpoints of other settings."""
    for script in copy.glob("conure_*.py"):
        text = re.sub(r"(    epochs: \w+) = \d+", r"\1 = 1", script.read_text())
        script.write_text(re.sub(r"(    channels: \w+) = \d+", r"\1 = 8", text))
    run(copy, "rm -rf Data/Session/*.csv checkpoints/*")


def assert_learned(copy: Path, task: int) -> None:
    """Asserts that nothing is forgotten, and that the accuracy of a task of classes is that of a row-by-row argmax."""
    assert run(copy, ".venv/bin/python evaluate.py").count(" same\n") == task
    run(copy, f".venv/bin/python -m tools.export --task {task}")
    content, _ = checkpoint.load(str(copy / "checkpoints" / f"ret_t{task}.pt"))
    record = content["tasks"][task]
    items, targets = (Vocabulary.from_tensor(each) for each in (content["items"], record["targets"]))
    data = data_loader.load_examples(record["data_path"], data_loader.Split(0.2), items, targets)
    assert Path(record["data_path"]).parent == copy / "Data" / "Session"
    if record["protocol"]["metric"] == "accuracy":
        assert len(targets) == 1 + 8
        batch = data.batch(data.splits["test"])
        with torch.no_grad():
            scores = checkpoint.build_model(content).scores(batch.inputs[batch.row_of], Stage(task, "inference"))
        right = (scores[:, 1:].argmax(dim=1) + 1 == batch.targets).double().mean().item()
        recorded = record["results"]["ret"]["test"]
        assert (recorded["accuracy"], recorded["n"]) == (right, len(batch.targets))
