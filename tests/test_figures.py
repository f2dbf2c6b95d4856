"""The pictures of the documentation: that they show what the code does and what the table says."""

import re
from importlib import import_module
from xml.etree import ElementTree

from conure.errors import InputError

import pytest
from conftest import ROOT

from docs import figures
from pruning import Stage

PAGE = (ROOT / "docs" / "results.md").read_text()


def drawn(folder, page: str = PAGE) -> dict[str, str]:
    """Both pictures, the second one of the scores on this page."""
    (folder / "page.md").write_text(page)
    figures.main(figures.Hyperparameters(str(folder / "page.md"), str(folder)))
    return {path.name: path.read_text() for path in folder.glob("*.svg")}


def test_the_pictures_in_docs_are_those_of_today(tmp_path):
    shown = {path.name: path.read_text() for path in (ROOT / "docs").glob("*.svg")}
    assert shown == drawn(tmp_path), "run `.venv/bin/python -m docs.figures`"


def test_a_picture_is_one_file_that_is_right_in_light_and_dark_on_a_phone_and_for_a_screen_reader(tmp_path):
    for picture in drawn(tmp_path).values():
        root = ElementTree.fromstring(picture)
        title, desc, style, _, paper, *_ = root
        _, _, width, height = (float(number) for number in root.get("viewBox").split())
        assert title.text and desc.text
        assert (paper.get("class"), float(paper.get("width")), float(paper.get("height"))) == ("paper", width, height)
        light, dark = style.text.split("@media (prefers-color-scheme: dark)")
        assert ".paper { fill: #fff" in light and ".paper { fill: #0" in dark
        assert min(int(size) for size in re.findall(r"(\d+)px", style.text)) * 358 / width > 9  # pixels on a phone
        assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", picture)


def test_another_score_in_the_table_moves_its_dot(tmp_path):
    row = re.search(r"^\| Conure \| .*", PAGE, re.MULTILINE)[0]
    mean, interval = row.split("|")[3].split(maxsplit=1)
    lower = f"{float(mean) - 0.0002:.4f} {interval.strip()}"
    changed = PAGE.replace(row, row.replace(f"{mean} {interval.strip()}", lower))
    before, after = (drawn(tmp_path, page) for page in (PAGE, changed))
    assert before["method.svg"] == after["method.svg"]
    assert lower in after["results.svg"]
    dots = [re.findall(r'<circle [^>]*cx="([^"]+)"', pictures["results.svg"]) for pictures in (before, after)]
    assert [float(old) > float(new) for old, new in zip(*dots) if old != new] == [True]


def test_a_method_without_a_score_has_no_dot_and_other_tables_are_refused(tmp_path):
    row = re.search(r"^\| SASRec \| .*", PAGE, re.MULTILINE)[0]
    empty = row.replace(row.split("|")[2], "  ")
    dots = [drawn(tmp_path, page)["results.svg"].count("<circle") for page in (PAGE, PAGE.replace(row, empty))]
    assert dots == [4 * len(figures.METHODS), 4 * len(figures.METHODS) - 1]
    for page, complaint in ((PAGE.replace(f"{row}\n", ""), "no row SASRec"), ("# Results\n", "no table")):
        with pytest.raises(InputError, match=complaint):
            drawn(tmp_path, page)


def test_stages_are_drawn_as_the_scripts_prune():
    ratios = {import_module(f"conure_tp_t{task}").Hyperparameters.prune_ratio for task in figures.TASKS}
    assert ratios == {1 - figures.KEPT}
    states = {
        Stage(1, "tp"): [(1, 1, "trained")],
        Stage(3, "tp"): [(0.3, 1, "frozen"), (0.21, 2, "frozen"), (0.49, 3, "trained")],
        Stage(2, "ret"): [(0.3, 1, "frozen"), (0.21, 2, "trained"), (0.49, 0, "unused")],
        Stage(2, "inference"): [(0.3, 1, "frozen"), (0.21, 2, "frozen"), (0.49, 0, "unused")],
    }
    for stage, expected in states.items():
        assert [(round(share, 6), *kind) for share, *kind in figures.segments(stage)] == expected
