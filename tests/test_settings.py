"""Settings blocks: ranges, help, and the settings that tools read from the scripts."""

import importlib
import re
import shutil
from types import SimpleNamespace
from typing import Any, get_type_hints

from conure import settings
from conure.errors import InputError

import pytest
from conftest import PROGRAMS, ROOT, STAGES

from tools.comparisons import study

SCRIPTS = [f"conure_{mode}_t{task}.py" for task, mode in STAGES]


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_number_has_a_range_and_every_field_a_comment(program):
    block = importlib.import_module(program).Hyperparameters
    described = settings.comments(block)
    for name, of_type in get_type_hints(block, include_extras=True).items():
        kind, limits = settings.kind_and_limits(of_type)
        assert limits or kind in (str, bool, tuple[str, ...]), f"{name} may be any number"
        assert described[name]


INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    "of_type, allowed, refused, words",
    [
        (settings.Count, [1], [0, -1], "at least 1"),
        (settings.Interval, [0, 7], [-1], "at least 0"),
        (settings.Seed, [0, 2**63 - 1], [-1, 2**63], "from 0 to 9223372036854775807"),
        (settings.Task, [1, 255], [0, 256], "from 1 to 255"),
        (settings.Width, [1, 65536], [0, 65537], "from 1 to 65536"),
        (settings.KernelSize, [1, 100], [0, 101], "from 1 to 100"),
        (settings.Dilations, [(1,), (10_000, 1)], [(0,), (1, 10_001)], "from 1 to 10000"),
        (settings.Length, [2], [1], "at least 2"),
        (settings.Positive, [1e-9, 1e30], [0.0, -1.0, INF, NAN], "above 0 and at most 1e+30"),
        (settings.NonNegative, [0, 0.5], [-0.1, INF, NAN], "at least 0 and below inf"),
        (settings.Share, [0.01, 0.99], [0.0, 1.0], "above 0 and below 1"),
        (settings.UpTo1, [1e-9, 1], [0.0, 1.1], "above 0 and at most 1"),
        (settings.Below1, [0.0, 0.99], [1.0, -0.1], "at least 0 and below 1"),
        (settings.Device, ["auto", "cpu", "cuda"], ["tpu", ""], "auto, cpu or cuda"),
    ],
)
def test_ranges_match_their_wording(of_type, allowed, refused, words):
    limits = settings.kind_and_limits(of_type)[1]
    assert str(limits) == words
    assert all(map(limits.allows, allowed)) and not any(map(limits.allows, refused))


@pytest.fixture
def copied(monkeypatch, tmp_path):
    """Copies the scripts to a folder from which the tools read settings; returns a function that edits a field."""
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
    assert settings.of_script("conure_tp_t1.py", dropout=0.1).dropout == 0.1
    assert settings.of_script("conure_tp_t1.py", as_original=False).dropout == 0.3


@pytest.mark.parametrize(
    "field, value, complaint",
    [
        ("epochs", "0", "epochs = 0 at the top of conure_tp_t1.py makes no sense: it must be at least 1"),
        ("prune_ratio", "1.5", "prune_ratio = 1.5 at the top of conure_tp_t1.py makes no sense"),
        ("dropout", "'half'", "dropout = 'half' at the top of conure_tp_t1.py is not of the form NUMBER"),
    ],
)
def test_settings_that_a_tool_reads_from_a_script_are_checked(copied, field, value, complaint):
    copied("conure_tp_t1.py", field, value)
    with pytest.raises(InputError, match=re.escape(complaint)):
        study.Study(study.Settings(), seed=1).settings(1, "tp")
