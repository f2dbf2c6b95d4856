"""Draw the two pictures of the documentation: what each stage reads and trains, and the scores with their intervals.

READS  table, a page: its first table with the header "| method | task 1, …"
WRITES method.svg and results.svg to output_dir
"""

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from conure import launch
from conure.errors import InputError
from conure.files import whole_file

import torch

from pruning import FREE, Stage, used_and_trained
from tools.report.markup import Html, element

TASKS, KEPT = (1, 2, 3, 4), 0.3  # KEPT: the share of the free weights that pruning gives to a task
METHODS = {  # as the table and as the picture call them
    "counting": "counting, no model",
    "SinMo": "4 models, from scratch",
    "FineAll": "4 models, fine-tuned",
    "SASRec": "4 SASRecs, fine-tuned",
    "SinMoAll": "1 model, fine-tuned",
    "Conure": "Conure, 1 model",
}
TARGETS = {1: "next movie", 2: "movies rated 4 later", 3: "movies rated 5 later", 4: "gender"}

# Units. A phone shows a picture 358 pixels wide: there type of 20 units is 9.4 pixels high, and 15 where there is room.
WIDTH, MARGIN, PIXELS_A_UNIT = 760, 24, 0.75
BARS, BAR, STEP = 176, 26, 32  # method.svg: where bars start, the height of one, and from one to the next
PANEL, ROW = 196, 34  # results.svg: the width of a panel, and the height of a row in it

# The tasks' colours are those of Okabe and Ito, a little lighter, which colour-blind readers can tell apart.
STYLE = """
text { font: 20px system-ui, -apple-system, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; fill: #1b2330 }
.title { font-size: 28px } .title, .bold, .ours text { font-weight: 700 } .muted { fill: #4d5766 }
.middle { text-anchor: middle } .paper { fill: #ffffff } .line { stroke: #cdd3dc; stroke-width: 1.5 }
.task1 { fill: #56b4e9 } .task2 { fill: #e69f00 } .task3 { fill: #009e73 } .task4 { fill: #dfa0c6 }
.task0 { fill: #9aa4b1 } text.on { fill: #10151c; font-weight: 700 }
.stripe { stroke: #ffffff; stroke-width: 8 } .stripes { fill: url(#stripes) }
.unused { fill: none; stroke: #808a99; stroke-width: 1.5; stroke-dasharray: 5 5 }
.dot { fill: #5a6473 } .interval { stroke: #5a6473; stroke-width: 3 } .ours .interval { stroke-width: 5 }
.ours .dot, .ours text, .band { fill: #b84700 } .ours .interval { stroke: #b84700 } .band { fill-opacity: 0.1 }
@media (prefers-color-scheme: dark) {
  text { fill: #e8ebf0 } .muted { fill: #a5afbd } .paper { fill: #0d1117 } .line { stroke: #38414d }
  .stripe { stroke: #0d1117 } .unused { stroke: #6b7684 } .dot { fill: #a5afbd } .interval { stroke: #a5afbd }
  .ours .dot, .ours text, .band { fill: #f0a030 } .ours .interval { stroke: #f0a030 } .band { fill-opacity: 0.2 }
}
"""


@dataclass
class Hyperparameters:
    table: str = "docs/results.md"  # the page that has the scores
    output_dir: str = "docs"  # where the pictures go


class Segment(NamedTuple):
    """Weights that a stage treats alike."""

    share: float  # of the layer's weights
    task: int  # that trains them, or else owns them
    state: str  # "trained", "frozen" or "unused"


class Score(NamedTuple):
    mean: float
    low: float
    high: float


def draw(tag: str, kind: str, **places: float) -> Html:
    return element(tag, class_=kind, **{name: f"{value:.1f}" for name, value in places.items()})


def text(x: float, y: float, content: str, kind: str = "") -> Html:
    """What stands between two asterisks is bold."""
    parts = (element("tspan", part, class_="bold" if odd % 2 else "") for odd, part in enumerate(content.split("*")))
    return element("text", *parts, x=f"{x:.1f}", y=f"{y:.1f}", class_=kind)


def lines(y: float, *content: str) -> list[Html]:
    return [text(MARGIN, y + 28 * number, words, "muted") for number, words in enumerate(content)]


def picture(title: str, desc: str, height: float, parts: list[Html]) -> bytes:
    """An SVG with a background of its own, the title, and the parts below that."""
    stripe = draw("line", "stripe", x1=0, y1=0, x2=0, y2=14)
    pattern = {"width": "14", "height": "14", "patternUnits": "userSpaceOnUse", "patternTransform": "rotate(45)"}
    defs = element("defs", element("pattern", stripe, id="stripes", **pattern))
    head = [element("title", title), element("desc", desc), element("style", Html(STYLE)), defs]
    paper = draw("rect", "paper", x=0, y=0, width=WIDTH, height=height, rx=10)
    size = {"width": f"{WIDTH * PIXELS_A_UNIT:.0f}", "height": f"{height * PIXELS_A_UNIT:.0f}"}
    size |= {"viewBox": f"0 0 {WIDTH} {height:.0f}", "xmlns": "http://www.w3.org/2000/svg", "role": "img"}
    return f"{element('svg', *head, paper, text(MARGIN, 46, title, 'title'), *parts, **size)}\n".encode()


def shares() -> dict[int, float]:
    """Of a layer's weights, by owner once all tasks are learned."""
    owned = {task: KEPT * (1 - KEPT) ** (task - 1) for task in TASKS}
    return owned | {FREE: 1 - sum(owned.values())}


def segments(stage: Stage) -> list[Segment]:
    """What a stage makes of the weights: training in its turn, inference after all tasks."""
    pruned = {"tp": stage.task - 1, "ret": stage.task, "inference": TASKS[-1]}[stage.mode]
    owners = [owner if owner <= pruned else FREE for owner in shares()]
    found: list[Segment] = []
    for share, owner, used, trained in zip(shares().values(), owners, *used_and_trained(torch.tensor(owners), stage)):
        state = "trained" if trained else "frozen" if used else "unused"
        kind = (stage.task if trained else owner if used else FREE, state)
        if found and found[-1][1:] == kind:
            share += found.pop().share
        found.append(Segment(share, *kind))
    return found


def bar(x: float, y: float, width: float, segment: Segment) -> list[Html]:
    """A segment, with the number of its task if it has one."""
    place, middle = {"x": x + 1.5, "y": y, "width": width - 3, "height": BAR}, x + width / 2
    if segment.state == "unused":
        return [draw("rect", "unused", **place)]
    parts, frozen = [draw("rect", f"task{segment.task}", **place)], segment.state == "frozen"
    if frozen:
        parts.append(draw("rect", "stripes", **place))
    if frozen and segment.task:
        parts.append(draw("circle", "paper", cx=middle, cy=y + BAR / 2, r=11))
    if segment.task:
        parts.append(text(middle, y + 20, str(segment.task), "middle bold" if frozen else "middle on"))
    return parts


def row(y: float, name: str, segments: list[Segment], percent: bool = False) -> list[Html]:
    """A name, and a bar of segments, with the share of each above it if `percent`."""
    parts, x, room = [text(MARGIN, y + 20, name)], float(BARS), WIDTH - MARGIN - BARS
    for segment in segments:
        parts += bar(x, y, room * segment.share, segment)
        if percent:
            words = f"{'' if segment.task else 'free '}{segment.share * 100:.0f} %"
            parts.append(text(x + room * segment.share / 2, y - 9, words, "middle muted"))
        x += room * segment.share
    return parts


def method() -> bytes:
    owned = [Segment(share, owner, "trained" if owner else "unused") for owner, share in shares().items()]
    parts = lines(82, "The weights of one layer, sorted by the task that owns them:")
    parts += row(130, "owner: task", owned, percent=True)
    parts += lines(
        194,
        f"*tp*: train the free weights, then prune: keep the largest {KEPT * 100:.0f} %.",
        "*ret*: retrain what was kept; what is free is read as zero.",
    )
    key = {"trained": (0, "used, trained"), "frozen": (212, "used, frozen"), "unused": (416, "not used: read as zero")}
    for state, (x, words) in key.items():
        parts += [*bar(MARGIN + x, 246, 48, Segment(1, FREE, state)), text(MARGIN + x + 58, 266, words)]
    y = 296
    for task in TASKS:
        parts += row(y, f"*tp {task}* train", segments(Stage(task, "tp")))
        parts += row(y + STEP, f"*ret {task}* retrain", segments(Stage(task, "ret")))
        y += 2 * STEP + 8
    parts += lines(y + 30, "*Inference* after all four: what a task reads never changes.")
    y += 44
    for task in TASKS:
        parts += row(y, f"*task {task}*", segments(Stage(task, "inference")))
        y += STEP
    parts += lines(
        y + 32,
        "Each task also has a head, and from task 2 on a readout; its update",
        "of the item embedding is read by later tasks, but never changed.",
    )
    desc = (
        "Each stage has a bar of weights. tp of a task reads all and trains the free ones. ret reads "
        "those of this task and earlier ones, and trains this task's. Inference reads the same as ret and trains none."
    )
    return picture("One network, four tasks, none forgotten", desc, y + 84, parts)


def read_scores(path: str) -> dict[tuple[int, str], dict[str, Score]]:
    """By task and metric, then by the name that the table gives to a method; without those whose cell is empty."""
    page = Path(path).read_text(encoding="utf-8")
    found = re.search(r"^\| method \| task 1, .*\n\|[-|]+\n(?:\|.*\n?)+", page, re.MULTILINE)
    if not found:
        raise InputError(f'{path} has no table with the header "| method | task 1, …": --table names the page that has')
    head, _, *rows = ([cell.strip(" *") for cell in line.split("|")[1:-1]] for line in found[0].splitlines())
    if missing := METHODS.keys() - {method for method, *_ in rows}:
        raise InputError(
            f"{path}: the table of scores has no row {min(missing)}, which METHODS in docs/figures.py names"
        )
    scores = {}
    for column, title in enumerate(head):
        if title.startswith("task "):
            task, metric = title.removeprefix("task ").split(", ")
            cells = {row[0]: re.findall(r"[\d.]+", row[column]) for row in rows if row[column]}
            scores[int(task), metric] = {method: Score(*map(float, cell)) for method, cell in cells.items()}
    return scores


def ticks(low: float, high: float) -> list[float]:
    """Three to five round numbers, from low or less to high or more; from 0, unless all is far from that."""
    low = low if low > high / 2 else 0.0
    power = 10.0 ** math.floor(math.log10((high - low) / 3))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor * 3 >= high - low)
    return [step * number for number in range(math.floor(low / step), math.ceil(high / step) + 1)]


def panel(x: float, y: float, scores: dict[str, Score]) -> list[Html]:
    """An axis, and a dot and an interval for each method."""
    axis = ticks(min(score.low for score in scores.values()), max(score.high for score in scores.values()))
    bottom = y + ROW * len(METHODS)

    def place(value: float) -> float:
        return x + (value - axis[0]) / (axis[-1] - axis[0]) * PANEL

    parts = []
    for value in axis:
        parts.append(draw("line", "line", x1=place(value), y1=y, x2=place(value), y2=bottom))
        parts.append(text(place(value), bottom + 26, f"{value:.4g}", "middle muted"))
    for number, method in enumerate(METHODS):
        if method in scores:
            (mean, low, high), middle, ours = scores[method], y + ROW * (number + 0.5), method == "Conure"
            if ours:
                parts.append(draw("rect", "band", x=place(low), y=y, width=place(high) - place(low), height=bottom - y))
            interval = draw("line", "interval", x1=place(low), y1=middle, x2=place(high), y2=middle)
            dot = draw("circle", "dot", cx=place(mean), cy=middle, r=8 if ours else 6)
            parts.append(element("g", interval, dot, class_="ours" if ours else ""))
    return parts


def results(scores: dict[tuple[int, str], dict[str, Score]]) -> bytes:
    """Two panels side by side, the methods' names to the left of them."""
    parts = lines(
        82,
        "Dot: test score; line: 95 % interval; band: that of Conure.",
        "4 models: one per task; 1 model: one for all. MovieLens 1M.",
        "Axes start at 0, except that of task 4.",
    )
    desc = []
    for number, ((task, name), by_method) in enumerate(scores.items()):
        metric = name.removesuffix("_all").replace("mrr", "MRR")
        shown = {method: by_method[method] for method in METHODS if method in by_method}
        x, y = 264 + number % 2 * (PANEL + 60), 194 + number // 2 * (ROW * len(METHODS) + 142)
        bottom = y + 42 + ROW * len(METHODS)
        parts += [text(x, y, f"*Task {task}*"), text(x, y + 27, TARGETS.get(task, ""), "muted")]
        parts += [*panel(x, y + 42, shown), text(x + PANEL / 2, bottom + 52, metric, "middle muted")]
        if number % 2 == 0:
            for place, (method, label) in enumerate(METHODS.items()):
                words = text(MARGIN, y + 49 + ROW * (place + 0.5), label)
                parts.append(element("g", words, class_="ours" if method == "Conure" else ""))
        told = (f"{METHODS[method]} {mean:.4f} [{low:.4f}, {high:.4f}]" for method, (mean, low, high) in shown.items())
        desc.append(f"Task {task}, {metric}: {'; '.join(told)}.")
    return picture("Scores after all four tasks", " ".join(desc), bottom + 76, parts)


def main(hp: Hyperparameters) -> None:
    for name, drawn in {"method.svg": method(), "results.svg": results(read_scores(hp.table))}.items():
        path = os.path.join(hp.output_dir, name)
        with whole_file(path) as file:
            file.write(drawn)
        print(f"wrote {path}")


if __name__ == "__main__":
    launch.run(main, Hyperparameters, __doc__)
