"""Makes a small synthetic data set, in the format and under the file names of the real one.

Every item belongs to a taste; every user has a favourite taste and a second one. The items of a taste form a series. A
sequence continues the series of its last item, or jumps to a popular item of one of the user's tastes. Clicks and likes
are objects of the same tastes. Gender and age follow the favourite taste with a probability of 0.9. So sequences
predict more than popularity does, and what task 1 learns helps the later tasks.

WRITES original_desen_pretrain.csv, original_desen_finetune_click_nouserID.csv,
       original_desen_finetune_like_nouserID.csv, original_desen_gender.csv, and original_desen_age.csv for a fifth
       task, whose scripts you add: "Adding a task" in README.md
NEXT   python conure_tp_t1.py
"""

from dataclasses import dataclass
from pathlib import Path

from conure import launch
from conure.settings import Count, Length, Seed

import numpy as np

from Data.task_files import SCRIPTS, file_of, print_next_steps, refuse_what_is_there, write_files


@dataclass
class Hyperparameters:
    output_dir: str = "Data/Session"  # folder of the task files
    seed: Seed = 10  # of all random draws
    users: Count = 2500  # number of users, each a line of the first file
    length: Length = 30  # items in a sequence; shorter histories are padded on the left with 0
    overwrite: bool = False  # replace existing task files


TASTES = 8
ITEMS_PER_TASTE = {"items": 50, "clicks": 25, "likes": 12}
FAVOURITE = 0.8  # probability that an item is of the favourite taste, not of the second one
SERIES = 0.6  # probability that the next item continues the series of the last one
FAITHFUL = 0.9  # probability that gender, or age, follows the favourite taste


def popular(random: np.random.Generator, count: int) -> int:
    """A random number below `count`; the probability of i is proportional to 1 / (i + 1)."""
    weight = 1 / np.arange(1, count + 1)
    return int(random.choice(count, p=weight / weight.sum()))


def sequence(random: np.random.Generator, tastes: np.ndarray, length: int) -> list[int]:
    """Item numbers from 1; item i belongs to taste (i - 1) // ITEMS_PER_TASTE["items"]."""
    count, items = ITEMS_PER_TASTE["items"], []
    for _ in range(length):
        if items and random.random() < SERIES:
            taste, place = divmod(items[-1] - 1, count)
            place = (place + 1) % count
        else:
            taste, place = tastes[int(random.random() > FAVOURITE)], popular(random, count)
        items.append(int(taste) * count + place + 1)
    return items


def targets(random: np.random.Generator, tastes: np.ndarray, kind: str, most: int) -> list[str]:
    """Up to `most` distinct targets of the user's tastes, as tokens such as clicks3_17; at least one."""
    count = ITEMS_PER_TASTE[kind]
    drawn = [
        f"{kind}{tastes[int(random.random() > FAVOURITE)]}_{popular(random, count)}"
        for _ in range(random.integers(1, most + 1))
    ]
    return list(dict.fromkeys(drawn))


def main(hp: Hyperparameters) -> None:
    files = {name: [] for name in (*SCRIPTS, "age")}
    refuse_what_is_there(hp.output_dir, [file_of(name) for name in files], hp.overwrite)
    random = np.random.default_rng(hp.seed)
    (random_age,) = random.spawn(1)
    for _ in range(hp.users):
        tastes = random.permutation(TASTES)[:2]
        items = sequence(random, tastes, int(random.integers(max(1, hp.length // 3), hp.length + 1)))
        line = ",".join(["0"] * (hp.length - len(items)) + [str(item) for item in items])
        files["pretrain"].append(line)
        files["click"].append(f"{line},,{','.join(targets(random, tastes, 'clicks', 4))}")
        if random.random() < 0.5:
            files["like"].append(f"{line},,{','.join(targets(random, tastes, 'likes', 3))}")
        faithful = random.random() < FAITHFUL
        files["gender"].append(f"{line},,{1 if (tastes[0] < TASTES // 2) == faithful else 2}")
        decade = tastes[0] if random_age.random() < FAITHFUL else random_age.integers(TASTES)
        files["age"].append(f"{line},,{10 + 10 * decade}")
    write_files(hp.output_dir, {file_of(name): lines for name, lines in files.items()})
    for name, lines in files.items():
        print(f"wrote {Path(hp.output_dir) / file_of(name)}: {len(lines):,} lines")
    print_next_steps(hp.output_dir, list(files), {"gender", "age"})


if __name__ == "__main__":
    launch.run(main, Hyperparameters, __doc__)
