"""The report as one self-contained HTML file: what its sections say and show."""

import datetime
import os
from pathlib import Path

from conure import metrics

from pruning import FREE, MAX_TASKS, Stage
from tools.compare import values
from tools.report import chain as chains
from tools.report import pictures
from tools.report.chain import Chain, Room
from tools.report.history import History
from tools.report.markup import GENERATOR, Html, element, join, path_cell, picture, table, td
from tools.report.pictures import DARK, LIGHT

# Media queries that select the rendering of a picture; print is always light.
DARK_PAGE, NARROW_PAGE = "screen and (prefers-color-scheme: dark)", "(max-width: 40rem)"
DESKTOP, PHONE = 9.4, 4.0  # width of the picture of weights by owner, inches
SMALL_SHARE = 0.01  # of all convolution weights: what the capacity section calls too little for a task
SHOWN_ROOMS = 5  # the least number of tasks that it lists
LONG = 18  # characters: a longer setting takes several lines


def page(chain: Chain, histories: list[History]) -> str:
    """The whole file."""
    ratios = [record["prune_ratio"] for record in chain.records.values()]
    rooms = chains.room(chain.layers, ratios)
    css = (Path(__file__).parent / "report.css").read_text(encoding="utf-8")
    title = f"Conure: {tasks_in_words(len(chain.records))} in one model"
    head = element(
        "head",
        Html(f'<meta charset="utf-8">{GENERATOR}<meta name="viewport" content="width=device-width, initial-scale=1">'),
        element("title", title),
        element("style", Html(css)),
    )
    sections = [
        scores(chain),
        matrix(chain),
        learning(histories),
        ownership(chain),
        capacity(chain, rooms, ratios[-1]),
        settings_and_versions(chain),
    ]
    body = element("body", header(chain, title, rooms), element("main", *sections))
    return "<!DOCTYPE html>\n" + element("html", head, body, lang="en") + "\n"


def tasks_in_words(count: int) -> str:
    return f"{count} task{'' if count == 1 else 's'}"


def percent(share: float, digits: int = 1) -> str:
    return f"{share:.{digits}%}".replace("%", "\N{NO-BREAK SPACE}%")


def task_list(tasks: list[int]) -> str:
    return f"task{'' if len(tasks) == 1 else 's'} {', '.join(map(str, tasks))}"


def task_name(task: int) -> str:
    return f"task\N{NO-BREAK SPACE}{task}"


def stage_name(stage: Stage) -> str:
    return f"{stage.mode}\N{NO-BREAK SPACE}{stage.task}"


def header(chain: Chain, title: str, rooms: list[Room]) -> Html:
    """Title, a sentence of summary, date and folder."""
    now = datetime.datetime.now().strftime("%Y-%m-%d, %H:%M")
    summary = f"One model has learned {tasks_in_words(len(chain.records))}{memory(chain)}; {space(chain, rooms)}."
    return element(
        "header",
        element("h1", title),
        element("p", summary, class_="summary"),
        element("p", f"{now} · {os.path.abspath(chain.folder)}", class_="small"),
    )


def memory(chain: Chain) -> str:
    """Whether a task before the last was forgotten."""
    *earlier, last = chain.records
    unfinished = f"; task {last} is not retrained yet" if chain.stages[-1] == (last, "tp") and chain.pruned() else ""
    if changed := [task for task in chain.records if chain.changed(task, chain.stages[-1])]:
        verb = "scores" if len(changed) == 1 else "score"
        return f"; {task_list(changed)} no longer {verb} as when learned{unfinished}"
    if not earlier:
        return unfinished
    who = "task 1 scores" if len(earlier) == 1 else f"tasks 1 to {earlier[-1]} score"
    same = all(chain.now(task).source == "same" for task in earlier)
    proof = " and forgotten nothing" if same else ", whose weights have changed since"
    return f"{proof}: {who} exactly as when learned{unfinished}"


def space(chain: Chain, rooms: list[Room]) -> str:
    """How much is free for further tasks."""
    if not chain.pruned():
        return "it was never pruned, so that no weight has an owner"
    total, free = sum(chain.counts().values()), chain.counts().get(FREE, 0)
    more = fitting(rooms, total)
    fit = f"room for {more or 'no'} more task{'' if more == 1 else 's'} of at least {percent(SMALL_SHARE, 0)} each"
    return f"{percent(free / total)} of its convolution weights are free, {fit}"


def scores(chain: Chain) -> Html:
    """What each task scored, its interval, and what it scores now: what a reader looks at first."""
    rows, latest = [], chain.stages[-1]
    for task, record in chain.records.items():
        learned, (low, high) = chain.learned(task), metrics.interval([values(record, raw=False)])
        score = f"{learned.score:.4f}"
        now = score if task == latest.task else matrix_cell(chain, task, latest)
        examples = record["results"][record["state"]]["test"]["n"]
        cells = [score, f"[{low:.3f}, {high:.3f}]", now, f"{record['popular']:.4f}", f"{examples:,}"]
        file = path_cell(os.path.basename(record["data_path"]), "file")
        rows.append([f"{task_name(task)}, {learned.name}", *cells, file])
    head = ["task", "when learned", "95 % interval", "now", "popularity", "test examples", "data file"]
    return element(
        "section",
        element("h2", "Scores"),
        element(
            "p",
            "Look here first. A task was forgotten if it scores less now than when it was learned: ",
            element("span", "▼", class_="key changed"),
            " marks it, ▲ a score that rose.",
        ),
        table("Scores", head, rows),
        element(
            "p",
            "On the test split, from 0 to 1; more is better. mrr@k: mean reciprocal rank of the target, 0 beyond rank "
            "k; mrr@k_all: of the next item at every position, not at the last alone. accuracy: share of the examples "
            "whose class is predicted right. Intervals are from a bootstrap over users. Popularity: what the most "
            "frequent targets of the training split would score.",
            class_="small",
        ),
    )


def matrix(chain: Chain) -> Html:
    """Every task after every stage, with average, backward transfer and forgetting."""
    rows = (
        [f"{task_name(task)}, {chain.learned(task).name}", *(matrix_cell(chain, task, stage) for stage in chain.stages)]
        for task in chain.records
    )
    scored = sum(cell.source == "scored" for cell in chain.cells.values())
    ret = " and prunes; ret k retrains the weights that pruning kept. After tp it is the pruned model that is scored"
    return element(
        "section",
        element("h2", "Every task after every stage"),
        element("p", f"Stage tp k trains task k{ret if chain.pruned() else ''}."),
        table("Scores by task and stage", ["task", *map(stage_name, chain.stages)], rows),
        element(
            "p",
            element("span", "0.1234", class_="key own"),
            " was recorded by a stage of the task's own. A later score is the same by construction if all that the "
            "task reads is bit-identical: the convolution weights of tasks 1 to k, the embedding with its updates by "
            "tasks 2 to k, positions, layer norms, the task's readout, head and ids. If a bit differs the task is "
            f"scored again from its data ({scored} of these scores). ",
            element("span", "▼ ▲", class_="key changed"),
            " marks a score that differs from the one when the task was learned.",
            class_="small",
        ),
        element("h3", "Average, backward transfer, forgetting"),
        transfers(chain),
    )


def matrix_cell(chain: Chain, task: int, stage: Stage) -> Html:
    if (task, stage) not in chain.cells:
        return td("–", "none")
    cell, learned = chain.cells[task, stage], chain.learned(task)
    name = "" if cell.name == learned.name else f" ({cell.name})"
    if cell.source == "recorded":
        return td(f"{cell.score:.4f}{name}", "own", "recorded by the stage itself")
    if chain.changed(task, stage):
        sign = "▼" if cell.score < learned.score else "▲"
        title = f"{signed(f'{cell.score - learned.score:.4f}')} since it was learned"
        return td(f"{sign} {cell.score:.4f}{name}", "changed", title)
    title = "the same by construction" if cell.source == "same" else "scored again"
    return td(f"{cell.score:.4f}{name}", "", title)


def transfers(chain: Chain) -> Html:
    after = chain.after()
    rows = []
    for name, members in chains.by_metric(chain).items():
        numbers = chains.transfer(after, members)
        cells = [f"{numbers.average:.4f}", difference(numbers.backward), difference(numbers.forgetting)]
        rows.append([f"{name}, {task_list(members)}", *cells])
    means = table("Averages by metric", ["metric", "average", "backward transfer", "forgetting"], rows)
    explained = element(
        "p",
        "One row per metric, as a mean of different metrics says nothing. R(l, t) is task t's score after the last "
        f"stage of task l, and T the last task, here after {stage_name(chain.stages[-1])}. Average: the mean of "
        "R(T, t). Backward transfer (Lopez-Paz and Ranzato 2017, GEM): the mean of R(T, t) − R(t, t) over the tasks "
        "before T; negative where something was lost. Forgetting (Chaudhry et al. 2018): the mean, over the same, of "
        "the best of R(t, t) to R(T − 1, t), less R(T, t). A dash: no task of this metric came before T.",
        class_="small",
    )
    return join([means, explained])


def difference(value: float | None) -> str:
    """Signed, or 0 if it is exactly 0."""
    return "–" if value is None else "0" if value == 0 else signed(f"{value:.4f}")


def signed(number: str) -> str:
    """With a plus or a true minus sign."""
    return number.replace("-", "−") if number.startswith("-") else f"+{number}"


def learning(histories: list[History]) -> Html:
    """A panel for each task of results.csv."""
    legend = element(
        "p",
        element("span", element("b", "●", class_="tp"), " tp, on the validation split"),
        element("span", element("b", "┄┄"), " pruning of the selected epoch's weights"),
        element("span", element("b", "●", class_="ret"), " ret, on the validation split"),
        element("span", element("b", "○"), " selected epoch: the best on validation"),
        element("span", element("b", "◆"), " its score on the test split"),
        class_="legend",
    )
    panels = [curve(history) for history in histories]
    return element("section", element("h2", "Learning curves"), legend, element("div", *panels, class_="panels"))


def curve(history: History) -> Html:
    scores = {"tp": history.kept.get("tp"), "pruned": history.pruned, "ret": history.kept.get("ret")}
    validation = ", ".join(f"{stage} {point[1]:.4f}" for stage, point in scores.items() if point)
    test = ", ".join(f"{stage} {point[1]:.4f}" for stage, point in history.test.items())
    alt = f"Task {history.task}, {history.name} over epochs. On validation: {validation or 'under way'}."
    renderings = {
        DARK_PAGE: pictures.learning_curve(history, DARK),
        "": pictures.learning_curve(history, LIGHT),
    }
    caption = f"Task {history.task}, {history.name} on test: {test or 'none yet'}"
    return element("figure", picture(renderings, alt), element("figcaption", caption))


def ownership(chain: Chain) -> Html:
    """A bar per layer, and a table of the sums."""
    counts, total = chain.counts(), sum(chain.counts().values())
    rows = [[owner_name(owner), f"{count:,}", percent(count / total)] for owner, count in counts.items()]
    shares = ", ".join(f"{owner_name(owner)} {count / total:.1%}" for owner, count in counts.items())
    renderings = {
        f"{DARK_PAGE} and {NARROW_PAGE}": pictures.ownership(chain.layers, DARK, PHONE),
        DARK_PAGE: pictures.ownership(chain.layers, DARK, DESKTOP),
        NARROW_PAGE: pictures.ownership(chain.layers, LIGHT, PHONE),
        "": pictures.ownership(chain.layers, LIGHT, DESKTOP),
    }
    return element(
        "section",
        element("h2", "Weights by owner"),
        element(
            "p",
            f"{total:,} convolution weights in {len(chain.layers)} layers, each pruned on its own. A task owns the "
            "weights that pruning kept for it: later tasks read them and never change them. Free weights are left to "
            "later tasks.",
        ),
        element("figure", picture(renderings, f"Weights of each layer by owner. In all: {shares}.")),
        table("Weights by owner", ["owner", "weights", "share"], rows),
    )


def owner_name(owner: int) -> str:
    return "free" if owner == FREE else task_name(owner)


def fitting(rooms: list[Room], total: int) -> int:
    """How many more tasks fit before one would keep less than SMALL_SHARE of all weights."""
    return sum(room.kept >= SMALL_SHARE * total for room in rooms)


def capacity(chain: Chain, rooms: list[Room], ratio: float) -> Html:
    """What the next tasks would keep and leave free."""
    total = sum(chain.counts().values())
    heading = element("h2", "Capacity left")
    if not rooms or not chain.pruned():
        why = "A layer has no free weight: no further task fits." if chain.pruned() else "This model was never pruned."
        return element("section", heading, element("p", why))
    fit = fitting(rooms, total)
    shown = rooms[: max(fit + 1, SHOWN_ROOMS)]
    shown += rooms[-1:] if shown[-1] != rooms[-1] else []
    rows = [[task_name(room.task), *(percent(count / total, 2) for count in room[1:])] for room in shown]
    if len(shown) > 1 and shown[-1].task - shown[-2].task > 1:
        rows.insert(-1, ["…"] * 3)
    end = (
        f"the owner map is out of numbers ({MAX_TASKS})"
        if rooms[-1].task == MAX_TASKS
        else "a layer has no free weight"
    )
    text = (
        f"With the prune ratio of the last task, {ratio:g}, {fit or 'no'} more task{'' if fit == 1 else 's'} "
        f"would keep at least {percent(SMALL_SHARE, 0)} of all convolution weights each; {len(rooms)} fit until "
        f"{end if rooms[-1].free else 'no layer has a free weight'}."
    )
    head = ["task", "would keep", "would leave free"]
    return element("section", heading, element("p", text), table("Further tasks, % of all weights", head, rows))


def settings_and_versions(chain: Chain) -> Html:
    """Hyperparameters and versions of each stage."""
    ran = {
        Stage(task, mode): values
        for task, record in chain.records.items()
        for mode, values in sorted(record["hyperparameters"].items(), reverse=True)  # tp before ret
    }
    return element(
        "section",
        element("h2", "Hyperparameters and versions"),
        element("h3", "Hyperparameters"),
        by_stage("Hyperparameters", ran),
        element("h3", "Versions"),
        by_stage("Versions", chain.versions),
    )


def by_stage(name: str, stages: dict[Stage, dict[str, str]]) -> Html:
    """What all stages have alike, then what differs, a column per stage; long values, which are paths, come last."""
    first, *others = stages.values()
    alike = {key: value for key, value in first.items() if all(each.get(key) == value for each in others)}
    keys = dict.fromkeys(key for each in stages.values() for key in each if key not in alike)
    long = [key for key in keys if any(len(each.get(key, "")) > LONG for each in stages.values())]
    ordered = [key for key in keys if key not in long] + long
    rows = [[key, *(setting(each.get(key)) for each in stages.values())] for key in ordered]
    same = table(f"{name} of every stage", ["name", "every stage"], ([key, setting(alike[key])] for key in alike))
    return join([same, *([table(name, ["name", *map(stage_name, stages)], rows)] if rows else [])])


def setting(value: str | None) -> Html:
    if value is None:
        return td("–", "none")
    return path_cell(value) if len(value) > LONG else td(value)
