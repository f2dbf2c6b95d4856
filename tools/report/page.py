"""The report as one HTML file that needs no other: what its sections say and show."""

import datetime
import os
from pathlib import Path

from pruning import FREE, MAX_TASKS, Stage
from tools.report import chain as chains
from tools.report import pictures
from tools.report.chain import Chain, Room
from tools.report.history import History
from tools.report.markup import GENERATOR, Html, element, join, path_cell, picture, table, td
from tools.report.pictures import DARK, LIGHT

# Which of a picture's renderings a browser takes; paper is always light.
DARK_PAGE, NARROW_PAGE = "screen and (prefers-color-scheme: dark)", "(max-width: 40rem)"
DESKTOP, PHONE = 9.4, 4.0  # inches across the picture of who owns what
SMALL_SHARE = 0.01  # of all conv weights: what the capacity section calls too little for a task
SHOWN_ROOMS = 5  # tasks that it lists at least
LONG = 18  # characters of a setting, which then takes several lines


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
        learning(histories),
        matrix(chain),
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


def task_name(task: int) -> str:
    return f"task\N{NO-BREAK SPACE}{task}"


def stage_name(stage: Stage) -> str:
    return f"{stage.mode}\N{NO-BREAK SPACE}{stage.task}"


def header(chain: Chain, title: str, rooms: list[Room]) -> Html:
    """Title, the main numbers in a sentence, date and folder."""
    now = datetime.datetime.now().strftime("%Y-%m-%d, %H:%M")
    summary = f"One model has learned {tasks_in_words(len(chain.records))}{memory(chain)}; {space(chain, rooms)}."
    return element(
        "header",
        element("h1", title),
        element("p", summary, class_="summary"),
        element("p", f"{now} · {os.path.abspath(chain.folder)}", class_="small"),
    )


def memory(chain: Chain) -> str:
    """What has become of the tasks before the last."""
    *earlier, last = chain.records
    unfinished = f"; task {last} is not retrained yet" if chain.stages[-1] == (last, "tp") and chain.pruned() else ""
    if changed := [task for task in chain.records if chain.changed(task, chain.stages[-1])]:
        now = (
            f"task {task} from {chain.learned(task).name} {chain.learned(task).score:.4f} when it was learned to "
            f"{chain.now(task).score:.4f} now"
            for task in changed
        )
        return f", and {len(changed)} of them changed since: {', '.join(now)}{unfinished}"
    if not earlier:
        return unfinished
    who = "task 1 scores" if len(earlier) == 1 else f"tasks 1 to {earlier[-1]} score"
    same = all(chain.now(task).source == "same" for task in earlier)
    proof = " and forgotten nothing" if same else ", whose weights have changed since"
    return f"{proof}: {who} exactly as when learned{unfinished}"


def space(chain: Chain, rooms: list[Room]) -> str:
    """What is left for further tasks."""
    if not chain.pruned():
        return "it was never pruned, so that no weight has an owner"
    total, free = sum(chain.counts().values()), chain.counts().get(FREE, 0)
    more = fitting(rooms, total)
    fit = f"room for {more} more task{'' if more == 1 else 's'} of at least {percent(SMALL_SHARE, 0)} each"
    return f"{percent(free / total)} of its conv weights are free, {fit}"


def learning(histories: list[History]) -> Html:
    """A panel for each task of results.csv."""
    legend = element(
        "p",
        element("span", element("b", "●", class_="tp"), " tp, on validation"),
        element("span", element("b", "┄┄"), " pruning of the state kept"),
        element("span", element("b", "●", class_="ret"), " ret, on validation"),
        element("span", element("b", "○"), " state kept: the best on validation"),
        element("span", element("b", "◆"), " its score on test"),
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


def matrix(chain: Chain) -> Html:
    """Every task after every stage, and what comes of it."""
    rows = (
        [f"{task_name(task)}, {chain.learned(task).name}", *(matrix_cell(chain, task, stage) for stage in chain.stages)]
        for task in chain.records
    )
    scored = sum(cell.source == "scored" for cell in chain.cells.values())
    anew = f"so for {scored} of the scores here" if scored else "which was the case nowhere here"
    return element(
        "section",
        element("h2", "Every task after every stage"),
        element("p", "Scores on the test part" + ("; after tp, those of the pruned model." if chain.pruned() else ".")),
        table("Scores by task and stage", ["task", *map(stage_name, chain.stages)], rows),
        element(
            "p",
            element("span", "0.1234", class_="key own"),
            " was recorded by the task's own stage. Afterwards a score is the same by construction as long as every "
            "bit that the task reads is the same: the conv weights of tasks 1 to k and their places, embedding, "
            "positions, layer norms, its head and the ids. The checkpoints are compared bit by bit for that; where a "
            f"bit differs the task is scored anew with its data, {anew}. ",
            element("span", "▼ ▲", class_="key changed"),
            " marks what differs from when the task was learned.",
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
    title = "the same by construction" if cell.source == "same" else "scored anew"
    return td(f"{cell.score:.4f}{name}", "", title)


def transfers(chain: Chain) -> Html:
    after = chain.after()
    rows = []
    for name, members in chains.by_metric(chain).items():
        numbers = chains.transfer(after, members)
        cells = [f"{numbers.average:.4f}", difference(numbers.backward), difference(numbers.forgetting)]
        rows.append([f"{name}, task{'s' if len(members) > 1 else ''} {', '.join(map(str, members))}", *cells])
    means = table("Averages by metric", ["metric", "average", "backward transfer", "forgetting"], rows)
    explained = element(
        "p",
        "A line per metric, as scores of different kinds have no mean. R(l, t) is task t's score after the last "
        f"stage of task l, and T the last task, here after {stage_name(chain.stages[-1])}. Average: the mean of "
        "R(T, t). Backward transfer (Lopez-Paz and Ranzato 2017, GEM): the mean of R(T, t) − R(t, t) over the tasks "
        "before T; negative where something was lost. Forgetting (Chaudhry et al. 2018): the mean, over the same, of "
        "the best of R(t, t) to R(T − 1, t), less R(T, t). A dash: no task of this metric came before T.",
        class_="small",
    )
    return join([means, explained])


def difference(value: float | None) -> str:
    """With its sign, unless it is nothing at all."""
    return "–" if value is None else "0" if value == 0 else signed(f"{value:.4f}")


def signed(number: str) -> str:
    """With a plus, or with a true minus sign."""
    return number.replace("-", "−") if number.startswith("-") else f"+{number}"


def ownership(chain: Chain) -> Html:
    """A bar per layer, and the sums in a table."""
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
        element("h2", "Who owns which share of each layer"),
        element("p", f"Of {total:,} conv weights in {len(chain.layers)} layers, each pruned by itself."),
        element("figure", picture(renderings, f"Shares of each conv layer. In all: {shares}.")),
        table("Weights by owner", ["owner", "weights", "share"], rows),
    )


def owner_name(owner: int) -> str:
    return "free" if owner == FREE else task_name(owner)


def fitting(rooms: list[Room], total: int) -> int:
    """How many more tasks fit before one would keep less than SMALL_SHARE of all weights."""
    return sum(room.kept >= SMALL_SHARE * total for room in rooms)


def amount(count: int, total: int) -> tuple[str, str]:
    return f"{count:,}", percent(count / total, 2)


def capacity(chain: Chain, rooms: list[Room], ratio: float) -> Html:
    """What the next tasks would take."""
    total = sum(chain.counts().values())
    heading = element("h2", "Capacity left")
    if not rooms or not chain.pruned():
        why = "A layer has no free weight: no further task fits." if chain.pruned() else "This model was never pruned."
        return element("section", heading, element("p", why))
    fit = fitting(rooms, total)
    shown = rooms[: max(fit + 1, SHOWN_ROOMS)]
    shown += rooms[-1:] if shown[-1] != rooms[-1] else []
    rows = [[task_name(room.task), *amount(room.kept, total), *amount(room.free, total)] for room in shown]
    if len(shown) > 1 and shown[-1].task - shown[-2].task > 1:
        rows.insert(-1, ["…"] * 5)
    end = f"all numbers up to {MAX_TASKS} are owners" if rooms[-1].task == MAX_TASKS else "a layer has no free weight"
    text = (
        f"With the prune ratio of the last task, {ratio:g}, {fit} more task{' fits' if fit == 1 else 's fit'} until "
        f"one would keep less than {percent(SMALL_SHARE, 0)} of all conv weights, and {len(rooms)} until "
        f"{end if rooms[-1].free else 'no layer has a free weight'}."
    )
    head = ["task", "keeps", "of all", "leaves free", "of all"]
    return element("section", heading, element("p", text), table("Further tasks", head, rows))


def settings_and_versions(chain: Chain) -> Html:
    """Hyperparameters of each stage, data of each task, versions of each checkpoint."""
    ran = {
        Stage(task, mode): values
        for task, record in chain.records.items()
        for mode, values in sorted(record["hyperparameters"].items(), reverse=True)  # tp before ret
    }
    return element(
        "section",
        element("h2", "Settings and versions"),
        element("h3", "Hyperparameters"),
        by_stage("Hyperparameters", ran),
        element("h3", "Data"),
        data(chain),
        element("h3", "Versions"),
        by_stage("Versions", chain.versions),
    )


def by_stage(name: str, values: dict[Stage, dict[str, str]]) -> Html:
    """A row for every key that any stage has; those with long values, which are paths, at the end."""
    keys = dict.fromkeys(key for each in values.values() for key in each)
    long = {key for each in values.values() for key, value in each.items() if len(value) > LONG}
    ordered = [key for key in keys if key not in long] + [key for key in keys if key in long]
    rows = ([key, *(setting(each.get(key)) for each in values.values())] for key in ordered)
    return table(name, ["setting", *map(stage_name, values)], rows)


def setting(value: str | None) -> Html:
    if value is None:
        return td("–", "none")
    return path_cell(value) if len(value) > LONG else td(value)


def data(chain: Chain) -> Html:
    rows = []
    for task, record in chain.records.items():
        scores = next(iter(record["results"].values()))
        sizes = [record["target_count"], *(scores[split]["n"] for split in ("validation", "test"))]
        held_out = f"{record['split']['test_fraction']:g}"
        rows.append([task_name(task), path_cell(record["data_path"]), *(f"{size:,}" for size in sizes), held_out])
    head = ["task", "file", "target ids", "rows of validation", "rows of test", "share held out"]
    return join([element("p", f"{chain.items:,} ids of items."), table("Data", head, rows)])
