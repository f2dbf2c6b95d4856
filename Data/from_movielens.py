"""Makes the task files from a MovieLens folder: ml-1m (`::` files) or ml-25m, ml-latest and the like (csv).

Each user's ratings in order of time; the first part is the history, whose last movies are the sequence. What was rated
after that gives the targets, so nothing of it is in the sequence.

READS  ratings.dat or ratings.csv (also .gz); users.dat where there is one
WRITES original_desen_pretrain.csv                    the sequence
       original_desen_finetune_click_nouserID.csv     the sequence, then later movies rated 4
       original_desen_finetune_like_nouserID.csv      the sequence, then later movies rated 5
       original_desen_gender.csv, original_desen_age.csv, from users.dat: gender 1 = M, 2 = F
NEXT   python conure_tp_t1.py
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import settings
from Data.task_files import write_task_files

COLUMNS = ["user", "movie", "rating", "time"]
KINDS = [int, int, float, int]


@dataclass
class Hyperparameters:
    movielens_dir: str = "ml-1m"  # folder with ratings.dat or ratings.csv
    output_dir: str = "Data/Session"  # where the task files go
    length: int = 50  # movies in a sequence; shorter histories are padded on the left with 0
    history: float = 0.8  # share of a user's ratings, in time, that the sequence is taken from
    click_rating: float = 4.0  # from this rating on, below like_rating, a later movie is a target of task 2
    like_rating: float = 5.0  # from this rating on a later movie is a target of task 3
    overwrite: bool = False  # replace task files that are there already


def find(folder: Path, name: str) -> Path | None:
    return next((path for suffix in ("", ".gz") if (path := folder / f"{name}{suffix}").exists()), None)


def read(path: Path, **how: Any) -> pd.DataFrame:
    try:
        return pd.read_csv(path, **how)
    except ValueError as error:
        raise settings.InputError(f"{path} is not as MovieLens has it: {str(error).splitlines()[0]}") from None


def read_ratings(folder: Path) -> pd.DataFrame:
    """Columns user, movie, rating, time; each user's rows in order of time, equal times by movie id."""
    if path := find(folder, "ratings.dat"):
        # `::` taken as `:`, an empty column and `:`, which pandas reads with its fast parser.
        ratings = read(path, sep=":", header=None, usecols=[0, 2, 4, 6], dtype=dict(zip((0, 2, 4, 6), KINDS)))
        ratings.columns = COLUMNS
    elif path := find(folder, "ratings.csv"):
        ratings = read(path, header=0, names=COLUMNS, dtype=dict(zip(COLUMNS, KINDS)))
    else:
        raise settings.InputError(f"{folder} holds neither ratings.dat nor ratings.csv: give --movielens_dir")
    return ratings.sort_values(["user", "time", "movie"])


def main(hp: Hyperparameters) -> None:
    source = Path(hp.movielens_dir)
    ratings = read_ratings(source)
    by_user = ratings.groupby("user", sort=False)
    position = by_user.cumcount()
    kept = (by_user["movie"].transform("size") * hp.history).astype(int)
    history = ratings[(position < kept) & (position >= kept - hp.length)].groupby("user", sort=False)["movie"]
    later = ratings[position >= kept]
    sequences = {
        user: ",".join(["0"] * (hp.length - len(movies)) + [str(movie) for movie in movies]) for user, movies in history
    }
    files = {"pretrain": list(sequences.values())}
    rating = later["rating"]
    for kind, chosen in (
        ("finetune_click_nouserID", (rating >= hp.click_rating) & (rating < hp.like_rating)),
        ("finetune_like_nouserID", rating >= hp.like_rating),
    ):
        targets = later[chosen].groupby("user", sort=False)["movie"]
        files[kind] = [
            f"{sequences[user]},,{','.join(map(str, movies))}" for user, movies in targets if user in sequences
        ]

    if users_path := find(source, "users.dat"):
        users = read(users_path, sep=":", header=None, usecols=[0, 2, 4], index_col=0, encoding="latin-1")
        if missing := sequences.keys() - set(users.index):
            raise settings.InputError(f"{users_path} lacks user {min(missing)}, who has ratings")
        users = users.loc[list(sequences)]
        gender = users[2].map({"M": 1, "F": 2})
        for kind, values in (("gender", gender), ("age", users[4])):
            files[kind] = [f"{sequences[user]},,{value}" for user, value in values.items()]
    else:
        print(f"{source} has no users.dat: no files for gender and age, so no task 4")
    write_task_files(hp.output_dir, files, hp.overwrite)


if __name__ == "__main__":
    settings.run(main, Hyperparameters, __doc__)
