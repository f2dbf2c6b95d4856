"""Settings: which values a field may have, where they come from, and how the help shows them."""

import dataclasses
import importlib
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_type_hints

from conure import settings
from conure.errors import InputError

import pytest
from conftest import ROOT, STAGES

from tools.comparisons import study

SCRIPTS = [f"conure_{mode}_t{task}.py" for task, mode in STAGES]
PROGRAMS = sorted(
    path.relative_to(ROOT).with_suffix("")
    for folder in (".", "tools", "tools/report", "Data", "benchmarks")
    for path in (ROOT / folder).glob("*.py")
    if "launch.run(" in path.read_text()
)


def block_of(program: Path) -> type:
    return importlib.import_module(".".join(program.parts)).Hyperparameters


@pytest.mark.parametrize("program", PROGRAMS, ids=str)
def test_every_number_has_a_range_and_every_field_a_comment(program):
    block = block_of(program)
    described = settings.comments(block)
    for name, of_type in get_type_hints(block, include_extras=True).items():
        kind, limits = settings.kind_and_limits(of_type)
        assert limits or kind in (str, bool, tuple[str, ...]), f"{name} may be any number"
        assert described[name]


@pytest.mark.parametrize(
    "name, good, bad",
    [
        ("device", ["auto", "cpu", "cuda"], ["tpu", ""]),
        ("precision", ["float32", "bfloat16"], ["fp8"]),
        ("seed", [0, 2**63 - 1], [-1, 2**63]),
        ("batch_size", [1], [0]),
        ("epochs", [1], [0, -1]),
        ("snapshot_minutes", [0, 0.5], [-1.0, float("inf"), float("nan")]),
        ("eval_every", [0, 7], [-1]),
        ("top_k", [1], [0]),
        ("learning_rate", [1e-9, 1e30], [0.0, -1.0, float("inf"), float("nan")]),
        ("table_rate", [1e-9, 1e30], [0.0, float("inf")]),
        ("beta1", [0.0, 0.99], [1.0, -0.1]),
        ("test_fraction", [0.01, 0.99], [0.0, 1.0]),
        ("prune_ratio", [0.01, 0.99], [0.0, 1.0]),
        ("channels", [1, 65536], [0, 65537]),
        ("dilations", [(1,), (10_000, 1)], [(0,), (1, 10_001)]),
        ("kernel_size", [1, 100], [0, 101]),
        ("negative_fraction", [1e-9, 1], [0.0, 1.1]),
        ("dropout", [0.0, 0.99], [1.0, -0.1]),
        ("dtype", ["float32", "float16", "bfloat16"], ["int8"]),
        ("loss", ["softmax", "bpr", "bce"], ["hinge"]),
        ("split", ["test", "validation", "heldout"], ["train"]),
        ("length", [2], [1]),
        ("task", [1, 255], [0, 256]),
        ("items", [3], [2]),
        ("targets", [3], [2]),
        ("rows", [10], [9]),
        ("steps", [1], [0]),
        ("first_epochs", [1], [0]),
        ("first_seed", [0], [-1]),
        ("percents", [(1, 99)], [(0,), (50, 100)]),
        ("depths", [(1, 254)], [(1, 0), (1, 255)]),
        ("seeds", [1], [0]),
        ("users", [1], [0]),
        ("history", [0.01, 1], [0.0, 1.1]),
        ("min_rows", [1], [0]),
        ("rho", [0.01, 100], [0.0, float("inf")]),
        ("l2", [0, 100], [-0.1, float("inf")]),
    ],
)
def test_the_ends_of_a_fields_range_in_every_block_that_has_it(name, good, bad):
    """A field of the same name that is a text, such as the tasks of Data.from_interactions, may be any."""
    found = 0
    for program in PROGRAMS:
        types = get_type_hints(block := block_of(program), include_extras=True)
        if name in types and settings.is_of(good[0], settings.kind_and_limits(types[name])[0]):
            found += 1
            for value in good:
                assert getattr(settings.resolve(block, {name: value}), name) == value
            for value in bad:
                refused = f"--{name} {settings.printable(value)} makes no sense: it must be "
                with pytest.raises(InputError, match=re.escape(refused)):
                    settings.resolve(block, {name: value})
    assert found


@pytest.mark.parametrize(
    "of_type, wanted",
    [
        (settings.Count, "at least 1"),
        (settings.KernelSize, "from 1 to 100"),
        (settings.Share, "above 0 and below 1"),
        (settings.UpTo1, "above 0 and at most 1"),
        (settings.Below1, "at least 0 and below 1"),
        (settings.NonNegative, "at least 0 and below inf"),
        (settings.Device, "auto, cpu or cuda"),
    ],
)
def test_what_a_value_must_be_is_said_in_words(of_type, wanted):
    assert str(settings.kind_and_limits(of_type)[1]) == wanted


@pytest.fixture
def copied(monkeypatch, tmp_path):
    """The scripts in a folder of their own, from where the tools take their settings; returns what edits one."""
    for name in SCRIPTS:
        shutil.copy(ROOT / name, tmp_path)
    monkeypatch.setattr(settings, "ROOT", tmp_path)

    def edit(name: str, field: str, value: str) -> None:
        text, places = re.subn(rf"(\n    {field}: .*?) = .*?  #", rf"\1 = {value}  #", (tmp_path / name).read_text())
        assert places == 1
        (tmp_path / name).write_text(text)

    return edit


def test_a_tool_trains_with_the_settings_at_the_top_of_the_scripts(copied):
    def of_task(task: int, mode: str, **changes: Any) -> SimpleNamespace:
        return study.Study(study.Settings(batch_size=7), seed=3).settings(task, mode, **changes)

    assert of_task(2, "tp").loss == "softmax" and of_task(1, "tp").dropout == 0.3
    copied("conure_tp_t2.py", "l2", "0.125")
    copied("conure_tp_t1.py", "kernel_size", "5")
    assert (of_task(2, "tp").l2, of_task(2, "tp").kernel_size) == (0.125, 5)
    for name in SCRIPTS:
        copied(name, "as_original", "True")
    hp = of_task(2, "tp", rho=0.9)
    assert (hp.loss, hp.informed_head, hp.l2, hp.rho, hp.batch_size, hp.seed) == ("bpr", False, 0.125, 0.9, 7, 3)
    hp = of_task(1, "ret")
    assert (hp.table_rate, hp.decay, hp.padding_in_loss, hp.dropout) == (1.0, False, True, 0.0)


def test_flags_win_over_the_originals_values_and_these_over_the_scripts(copied):
    copied("conure_tp_t1.py", "as_original", "True")
    assert settings.of_script("conure_tp_t1.py", dropout=0.1).dropout == 0.1
    assert settings.of_script("conure_tp_t1.py").dropout == 0.0
    assert settings.of_script("conure_tp_t1.py", as_original=False).dropout == 0.3
    assert settings.of_script("conure_ret_t1.py", as_original=True).table_rate == 1.0


@pytest.mark.parametrize(
    "field, value, complaint",
    [
        ("epochs", "0", "epochs = 0 at the top of conure_tp_t1.py makes no sense: it must be at least 1"),
        ("prune_ratio", "1.5", "prune_ratio = 1.5 at the top of conure_tp_t1.py makes no sense"),
        ("dropout", "'half'", "dropout = 'half' at the top of conure_tp_t1.py is not of the form NUMBER"),
    ],
)
def test_what_a_tool_reads_in_a_script_is_checked(copied, field, value, complaint):
    copied("conure_tp_t1.py", field, value)
    with pytest.raises(InputError, match=re.escape(complaint)):
        study.Study(study.Settings(), seed=1).settings(1, "tp")


def test_a_block_shows_what_is_learned_and_the_help_shows_that_first(run_here):
    """All scripts have the same settings of running, and none of them in its own block."""
    running = {field.name for field in dataclasses.fields(settings.Running)}
    for name in SCRIPTS:
        own = re.findall(r"^    (\w+): ", (ROOT / name).read_text(), re.MULTILINE)
        assert {"data_path", "seed", "as_original"} <= set(own) and not running & set(own)
    _, output, _ = run_here("conure_tp_t1.py", "--help")
    learning, of_running = output.split("\nrunning:\n")
    flags = re.compile(r"^  --(\w+)", re.MULTILINE)
    assert set(flags.findall(of_running)) == running and len(set(flags.findall(learning))) == 19
