"""Tables of interactions → task files: Data/from_interactions.py."""

import gzip
import itertools
import os
import re
import shlex
import sys
from pathlib import Path

from conure.vocabulary import Vocabulary

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT

import data_loader
from Data import tables
from Data.task_files import file_of, print_next_steps

SCRIPT = "Data.from_interactions"
MOVIELENS = Path(os.environ.get("CONURE_MOVIELENS", "nowhere"))  # tables in ml-1m-half, files in ml-1m-half-conure
COLUMNS = ["--columns", "user,item,rating,time", "--user", "user", "--item", "item", "--order", "time,item"]
RATED = ["--task", "click=later where rating >= 4 and rating < 5", "--task", "like=later where rating >= 5"]


@pytest.fixture
def make(tmp_path, monkeypatch, run_here):
    """Writes tables into the working folder, runs the script there, and returns its output and its files' lines."""
    monkeypatch.chdir(tmp_path)

    def run(tables: dict[str, str | bytes], *flags: str) -> tuple[str, dict[str, list[str]]]:
        for name, content in tables.items():
            Path(name).write_bytes(content.encode() if isinstance(content, str) else content)
        first = next(iter(tables))
        code, printed, error = run_here(SCRIPT, "--interactions", first, *flags, "--output_dir", "out", "--overwrite")
        assert code == 0, error
        shown = {path.name: path.read_text().splitlines() for path in Path("out").iterdir()}
        return printed, {short(name): lines for name, lines in shown.items()}

    return run


@pytest.fixture
def refused(tmp_path, monkeypatch, run_here):
    """As `make`, but the input must be refused in one line, which is returned, and nothing written."""
    monkeypatch.chdir(tmp_path)

    def run(tables: dict[str, str | bytes], *flags: str) -> str:
        for name, content in tables.items():
            Path(name).write_bytes(content.encode() if isinstance(content, str) else content)
        first = next(iter(tables), "none.csv")
        code, _, error = run_here(SCRIPT, "--interactions", first, *flags, "--output_dir", "out")
        assert code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
        assert not Path("out").exists()
        return error

    return run


def short(file_name: str) -> str:
    return re.sub(r"original_desen_|finetune_|_nouserID|\.csv$", "", file_name)


def table(rows: list[tuple], header: str = "user_id,item_id,timestamp") -> str:
    return "\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n"


def days(users: str = "ab", count: int = 10) -> list[tuple]:
    """Rows of each user, oldest first; items are named by user and time."""
    return [(user, f"{user}{time}", time) for user in users for time in range(count)]


@pytest.mark.skipif(not MOVIELENS.exists(), reason="CONURE_MOVIELENS names no folder")
def test_movielens_files_are_bit_identical_to_those_of_the_results(tmp_path, run_here):
    source = MOVIELENS / "ml-1m-half"
    users = ["--users", str(source / "users.dat"), "--users_columns", "user,gender,age,occupation,zip"]
    tasks = [*RATED, "--task", "gender=users.gender", "--task", "age=users.age"]
    arguments = [SCRIPT, "--interactions", str(source / "ratings.dat.gz"), *COLUMNS, *users, *tasks]
    code, _, error = run_here(*arguments, "--output_dir", str(tmp_path))
    assert code == 0, error
    expected = sorted((MOVIELENS / "ml-1m-half-conure").glob("*.csv"))
    assert len(expected) == 5
    for path in expected:
        made = (tmp_path / path.name).read_bytes()
        if "gender" in path.name:
            made = made.replace(b",,M\n", b",,1\n").replace(b",,F\n", b",,2\n")
        assert made == path.read_bytes(), path.name
    code, _, error = run_here(*arguments, "--output_dir", str(tmp_path))
    assert code == 2 and "--overwrite" in error


def test_a_gzipped_csv_with_half_stars(make):
    stars = [3.0, 1.0, 2.5, 4.0, 4.5, 5.0, 5.0]
    ratings = [(user, 10 * time, rating, time) for user in (2, 1) for time, rating in enumerate(stars, start=1)]
    content = gzip.compress(table(ratings, "userId,movieId,rating,timestamp").encode())
    flags = ["--user", "userId", "--item", "movieId", "--length", "4", "--history", "0.5"]
    _, files = make({"ratings.csv.gz": content}, *flags, *RATED)
    lines = {"pretrain": "0,10,20,30", "click": "0,10,20,30,,40,50", "like": "0,10,20,30,,60,70"}
    assert {name: files.pop(name) for name in lines} == {name: [line, line] for name, line in lines.items()}
    assert files == {"users": ["1", "2"], "users_click": ["1", "2"], "users_like": ["1", "2"]}


def test_no_row_after_the_cut_is_in_a_sequence(make):
    random = np.random.default_rng(3)
    times, users = random.permutation(4000).tolist(), random.integers(0, 40, 4000).tolist()
    rows = [(user, f"i{time}", time, int(random.random() < 0.7)) for user, time in zip(users, times)]
    header, flags = "user_id,item_id,timestamp,seen", ["--where", "seen == 1", "--task", "click=later", "--length", "9"]
    _, first = make({"rows.csv": table(rows, header)}, *flags)
    random.shuffle(rows)
    _, shuffled = make({"rows.csv": table(rows, header)}, *flags)
    assert first == shuffled and len(first["pretrain"]) == 40
    for user, line, later in zip(first["users"], first["pretrain"], first["click"], strict=True):
        own = sorted((time, seen) for owner, _, time, seen in rows if owner == int(user))
        seen = [time for time, seen in own if seen]
        kept = seen[: int(len(seen) * 0.8)]
        assert line == ",".join(f"i{time}" for time in kept[-9:])
        assert later == f"{line},," + ",".join(f"i{time}" for time, _ in own if time > kept[-1])


def test_the_order_of_ties_depends_on_the_seed_not_on_the_file(make):
    rows = [(user, f"{hour}{item}", 5, hour) for user in range(9) for hour in (1, 2) for item in "abcd"]

    def lines(order: str, *flags: str) -> list[str]:
        content = table(rows, "user_id,item_id,day,hour")
        return make({"rows.csv": content}, "--history", "1", "--length", "8", "--order", order, *flags)[1]["pretrain"]

    first = lines("day,hour")
    assert {re.sub("[a-d]", "", line) for line in first} == {"1,1,1,1,2,2,2,2"}, "what does not tie keeps its order"
    assert len(set(first)) == 9, "no order is that of all users"
    assert lines("day,hour", "--seed", "11") != first
    assert set(lines("")) == {"1a,1b,1c,1d,2a,2b,2c,2d"}
    np.random.default_rng(3).shuffle(rows)
    assert lines("day,hour") == first


def test_the_cut_separates_no_ties_and_targets_are_strictly_later(make):
    random = np.random.default_rng(3)
    numbers = zip(random.integers(0, 40, 2000).tolist(), random.integers(0, 25, 2000).tolist())
    rows = [(user, f"i{row}", time, int(random.random() < 0.7)) for row, (user, time) in enumerate(numbers)]
    rows += [(40, f"same{row}", 7, 1) for row in range(9)]
    content = table(rows, "user_id,item_id,timestamp,seen")
    printed, files = make({"rows.csv": content}, "--where", "seen == 1", "--task", "click=later", "--length", "99")
    assert "1 of 41 users are left out: fewer than 5 rows where seen == 1, or none before the cut" in printed
    moved = unseen = 0
    for user, line, later in zip(range(40), files["pretrain"], files["click"], strict=True):
        own = [(item, time, seen) for owner, item, time, seen in rows if owner == user]
        times = sorted(time for _, time, seen in own if seen)
        cut = times[int(len(times) * 0.8)]
        last = max(time for time in times if time < cut)
        assert set(line.split(",")) - {"0"} == {item for item, time, seen in own if seen and time <= last}
        assert set(later.split(",,")[1].split(",")) == {item for item, time, _ in own if time > last}
        moved += times[int(len(times) * 0.8) - 1] == cut
        unseen += any(time == last and not seen for _, time, seen in own)
    assert moved > 10 and unseen > 10, "the rows have what is promised for them"


def test_more_than_a_tenth_of_ties_is_printed(make):
    def said(ties: dict[str, int], *flags: str) -> str:
        """The first line printed for two users with 20 neighbouring pairs of rows; rows with seen = 0 do not count."""
        rows = [(user, time + 1, max(time, ties[user]), 1) for user in "ab" for time in range(11)]
        rows += [(user, 99, 10, 0) for user in "ab" for _ in range(9)]
        content = table(rows, "user_id,item_id,timestamp,seen")
        printed, _ = make({"rows.csv": content}, "--where", "seen == 1", *flags)
        return printed.splitlines()[0]

    message = "15.0 % of neighbouring rows have the same timestamp: those come in random order (--seed)"
    assert said({"a": 3, "b": 0}) == message
    assert said({"a": 1, "b": 1}) == ""
    assert said({"a": 3, "b": 3}, "--order", "") == said({"a": 3, "b": 3}, "--order", "timestamp,item_id") == ""


def test_targets_of_another_table_are_later_than_the_sequence(make):
    other = [("a", "early", 6), ("b", "same", 7), ("a", "x", 9), ("nobody", "z", 99), ("b", "y", 8), ("a", "w", 8)]
    tables = {"rows.csv": table(days()), "other.csv": table(other)}
    _, files = make(tables, "--task", "shop=other.csv", "--length", "3")
    assert files["shop"] == ["a5,a6,a7,,w,x", "b5,b6,b7,,y"]
    _, files = make(tables, "--task", "shop=other.csv", "--length", "3", "--order", "")
    assert files["shop"] == ["a5,a6,a7,,early,x,w", "b5,b6,b7,,same,y"], "without an order, all of it"


def test_dates_of_different_formats_are_compared_across_tables(make):
    dates = [("a", item, f"2024-01-{day:02}T12:00:00Z") for day, item in enumerate("vwxyz", 1)]
    other = [("a", "before", "2024-01-04 10:00:00"), ("a", "one", "2024-01-04 14:00:00"), ("a", "two", "2024-01-05")]
    _, files = make({"rows.csv": table(dates[::-1]), "other.csv": table(other)}, "--task", "shop=other.csv")
    assert files["shop"][0].endswith(",0,v,w,x,y,,one,two")


DAYS = range(1, 6)
SALES = table(
    [("a", d, f"2024-{4 + d}-{d:02}", f"2024-07-0{d}T00:00+02:00", 1 + d % 2, d, f"2024-07-{d}") for d in DAYS],
    "user_id,item_id,bought at,paid,stars,bought_at,date_1",
)


@pytest.mark.parametrize("form", ["{}", "({})", "stars > 0 & {}", "{} & stars > 0", "not (stars == 9 | not {})"])
def test_conditions_compare_dates(tmp_path, form):
    kept = {
        "`bought at` > '2024-6-1'": [2, 3, 4, 5],
        "`bought at` > '2024-07-03'": [4, 5],
        "'2024-07' < `bought at` <= '2024-08-04T00:00Z'": [3, 4],
        "`bought at` == '2024-08-04'": [4],
        "paid >= '2024-07-02T22:00Z'": [3, 4, 5],
        "paid <= `bought at`": [3, 4, 5],
        "(`bought at` > '2024-6-1' and bought_at < 4)": [2, 3],
        "date_1 > '2024-07-03'": [4, 5],
    }
    (tmp_path / "rows.csv").write_text(SALES)
    conditions = [form.format(condition) for condition in kept]
    columns = ("user_id", "item_id"), ["bought at"]
    meets = tables.read(str(tmp_path / "rows.csv"), "", *columns, conditions, "").meets
    assert [(np.flatnonzero(meets[condition]) + 1).tolist() for condition in conditions] == list(kept.values())


@pytest.mark.parametrize(
    "condition, complaint",
    [
        ("`bought at` > '01.06.2024'", "bought at holds dates, and '01.06.2024' is none: write one as '2020-12-31"),
        ("(`bought at`) > 'now'", "bought at holds dates, and 'now' is none"),
        ("'June' < paid", "paid holds dates, and 'June' is none"),
        ("paid > 3", "paid holds dates, and 3 is none"),
        ("paid in ['2024-01-01']", "paid holds dates, and ['2024-01-01'] is none"),
    ],
)
def test_comparing_dates_with_other_values_is_refused(refused, condition, complaint):
    assert complaint in refused({"rows.csv": SALES}, "--order", "bought at", "--where", condition)


def test_an_order_column_of_text_is_refused_with_its_line(refused):
    rows = ["a,b,2", 'a,"x', 'y",1', "", " ", "a,c,May", "a,d,4", "a,e,June", ""]
    head = "user_id,name,timestamp"
    flags = ["--item", "timestamp", "--user", "user_id"]
    wanted = "line 7: timestamp 'May' is neither a number nor an ISO date (2020-12-31 23:59:59) (nor are 1 others)"
    assert wanted in refused({"rows.csv": "\n".join([head, *rows])}, *flags)
    assert wanted.replace("7", "6") in refused({"rows.csv": "\r\n".join(rows)}, *flags, "--columns", head)


def test_rows_are_sorted_by_all_order_columns(make):
    rows = [("a", item, day, hour) for item, day, hour in zip("54321", "12211", (12, 10, 9, 2, 3))]
    tables = {"rows.csv": table(rows, "user_id,item_id,day,hour")}
    ordered = {"day,hour": "2,1,5,3,4", "hour": "2,1,3,4,5", "": "5,4,3,2,1"}
    for order, expected in ordered.items():
        assert make(tables, "--history", "1", "--length", "5", "--order", order)[1]["pretrain"] == [expected]


def test_ids_and_classes_keep_their_text_and_conditions_see_numbers(make):
    rated = [("0042", ""), ("42", "5"), (" 1 ", "10"), ("1.0", "9"), ("0", "10"), ("0", "2"), ("42", "10")]
    rows = [(user, item, time, value) for user in ("007", "7", "1.0") for time, (item, value) in enumerate(rated)]
    users = "user_id,zip\n007,02134\n7,\n1.0,2134\n"
    tables = {"rows.csv": table(rows, "user_id,item_id,timestamp,value"), "users.csv": users}
    flags = ["--users", "users.csv", "--task", "many=later where value >= 10 or item_id == 42"]
    flags += ["--task", "zip=users.zip where user_id < 100", "--history", "0.6", "--length", "5"]
    printed, files = make(tables, *flags)
    assert files["users"] == ["7", "007", "1.0"]
    assert files["pretrain"] == ["0,0042,42,1,1.0"] * 3
    assert files["many"] == ["0,0042,42,1,1.0,,item_0,42"] * 3
    assert files["zip"] == ["0,0042,42,1,1.0,,02134", "0,0042,42,1,1.0,,2134"] and files["users_zip"] == ["007", "1.0"]
    assert "item 0, which is padding in the task files, is called item_0" in printed


def test_whole_histories_for_serving(make):
    """--history 1: a sequence ends with the user's last row; tasks may be of another table or of users, not `later`."""
    tables = {"rows.csv": table([*days(), ("c", "only", 1)]), "users.csv": "user_id,age\na,1\nb,2\n"}
    tables |= {"other.csv": table([(user, f"{user}{time}", time) for user in "ab" for time in (9, 11)])}
    printed, files = make(tables, "--history", "1", "--min_rows", "1", "--length", "3")
    assert files == {"pretrain": ["a7,a8,a9", "b7,b8,b9", "0,0,only"], "users": ["a", "b", "c"]}
    served = f"--data_path out/{file_of('pretrain')} --ids out/users.csv"
    assert printed.endswith(f"next, to serve them: python -m tools.recommend --task 1 {served}\n")
    flags = ["--task", "click=other.csv", "--users", "users.csv", "--task", "age=users.age"]
    printed, files = make(tables, "--history", "1", "--length", "3", *flags)
    assert files["click"] == ["a7,a8,a9,,a11", "b7,b8,b9,,b11"] and files["age"] == ["a7,a8,a9,,1", "b7,b8,b9,,2"]
    assert "to serve" not in printed


def test_classes_of_users(make):
    known = "user_id,gender\na,0\na,1\nb,0\nc,2\nc,1\nd,2\nd,2\ne,\ne,1\n"
    flags = ["--users", "users.csv", "--task", "gender=users.gender where gender != 0"]
    printed, files = make({"rows.csv": table(days("abcdefg")), "users.csv": known}, *flags)
    assert files["users_gender"] == ["a", "d", "e"] and [line[-3:] for line in files["gender"]] == [",,1", ",,2", ",,1"]
    assert "1 users have more than one gender" in printed


def test_input_tables_are_never_overwritten(tmp_path, run_here):
    (tmp_path / "rows.csv").write_text(table(days()))
    users = tmp_path / "users.csv"
    users.write_text("user_id,age\na,1\nb,2\n")
    flags = ["--interactions", str(tmp_path / "rows.csv"), "--users", str(users), "--task", "age=users.age"]
    code, _, error = run_here(SCRIPT, *flags, "--output_dir", str(tmp_path), "--overwrite")
    assert code == 2 and "users.csv is a table that is read: give another --output_dir" in error
    assert users.read_text().startswith("user_id,age")


def test_left_out_rows_and_users_are_counted(make):
    rows = [*days("ab"), ("", "x", 1), ("a", "", 2), ("a", "z", ""), ("b", r"\N", 3), ("A", "few", 1)]
    printed, files = make({"rows.csv": table(rows)}, "--history", "1", "--length", "3")
    assert files["users"] == ["a", "b"] and files["pretrain"] == ["a7,a8,a9", "b7,b8,b9"]
    assert "4 rows lack a value of user_id, item_id, timestamp" in printed and "1 of 3 users are left out" in printed


def test_the_output_fits_80_columns_and_names_the_script_for_each_file(make):
    tasks = ("later=later", "click=later where timestamp > 8", "c=later", "d=later")
    flags = [flag for task in tasks for flag in ("--task", task)]
    printed, _ = make({"rows.csv": table([*days("abc"), *days("d", 5)])}, *flags, "--length", "3")
    lines = printed.splitlines()
    assert max(len(line) for line in lines if "data_path" not in line) <= 80
    rows = {line.split()[1]: line.split()[2:] for line in lines if re.match(r" ?\d+ ", line)}
    assert rows["pretrain.csv"] == ["4", "12", "12", "3", "3"]
    assert rows["later.csv"] == ["4", "7", "7", "3", "3"] and rows["finetune_click_nouserID.csv"][:3] == ["3", "3", "3"]
    apart = "--index_path out/index.csv --checkpoint_dir out/checkpoints"
    assert f"task 2, later: python conure_tp_t2.py --data_path out/{file_of('later')} {apart}" in lines
    assert 'task 5, d: a task of items, see "Adding a task" in README.md' in lines
    assert f"next: python conure_tp_t1.py --data_path out/{file_of('pretrain')} {apart}" in lines


def test_default_files_need_no_data_path(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    print_next_steps("Data/Session", ["pretrain", "click", "gender", "gender"], {"gender"})
    assert capsys.readouterr().out.splitlines() == [
        "next: python conure_tp_t1.py",
        "task 2, click: python conure_tp_t2.py",
        'task 3, gender: a task of classes, see "Adding a task" in README.md',
        "task 4, gender: python conure_tp_t4.py",
    ]
    print_next_steps("a b", ["pretrain", "click"], set())
    apart = "--index_path 'a b/index.csv' --checkpoint_dir 'a b/checkpoints'\n"
    assert capsys.readouterr().out.endswith(f" --data_path 'a b/{file_of('click')}' {apart}")


def test_very_many_targets_take_several_lines_that_the_scripts_can_read(make):
    flags = ["--task", "click=later", "--history", "0.001", "--length", "20"]
    _, files = make({"rows.csv": table(days("ab", 12_000))}, *flags)
    assert files["users_click"] == ["a", "a", "b", "b"]
    data = data_loader.load_examples(f"out/{file_of('click')}", data_loader.Split(0.2), Vocabulary(["<UNK>", "0"]))
    assert len(data.targets) == 2 * (12_000 - 12)


@pytest.mark.parametrize(
    "separator, name", [(",", "t.csv"), ("\t", "t.tsv"), ("|", "t.dat"), (";", "t.csv"), ("::", "t.dat")]
)
def test_separators(make, separator, name):
    rows = [(user, f"x y{time}", time) for user in "ab" for time in range(10)]
    content = table(rows).replace(",", separator)
    expected = [",".join(f"x y{time}" for time in (6, 7, 8, 9))] * 2
    assert make({name: content}, "--history", "1", "--length", "4")[1]["pretrain"] == expected
    assert make({name: "\ufeff" + content}, "--history", "1", "--length", "4")[1]["pretrain"] == expected
    bare = content.split("\n", 1)[1].replace("\n", "\r\n")
    flags = ["--columns", "user_id,item_id,timestamp", "--history", "1", "--length", "4"]
    assert make({name: bare}, *flags)[1]["pretrain"] == expected
    assert make({name: "\ufeff" + bare}, *flags)[1]["pretrain"] == expected


def test_parquet(make, tmp_path):
    pytest.importorskip("pyarrow")
    rows = pd.DataFrame(days(count=10), columns=["user_id", "item_id", "timestamp"])
    rows["timestamp"] = pd.to_datetime(rows["timestamp"], unit="D")
    rows["item_id"] = rows["timestamp"].dt.day.astype(float)
    rows.loc[3, "item_id"] = np.nan
    rows["stars"] = pd.array([1] * 19 + [pd.NA], dtype="Int64")  # the last row of user b
    rows.sample(frac=1, random_state=1).to_parquet(tmp_path / "rows.parquet")
    flags = ["--interactions", "rows.parquet", "--history", "1", "--length", "3", "--task", "gone=rows.csv"]
    flags += ["--where", "stars == 1"]
    _, files = make({"rows.csv": "user_id,item_id,timestamp\na,1,2024-01-01\nb,2,2024-01-01\n"}, *flags)
    assert files["pretrain"] == ["8,9,10", "7,8,9"] and files["gone"] == ["8,9,10,,1", "7,8,9,,2"]


def test_parquet_without_pyarrow_names_it(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert ".venv/bin/python -m pip install pyarrow" in refused({"rows.parquet": b"PAR1"})


ROWS = {"rows.csv": table(days())}
USERS = ROWS | {"users.csv": "user_id,age\na,1\nb,2\n"}


@pytest.mark.parametrize(
    "tables, flags, complaint",
    [
        ({}, [], "none.csv does not exist"),
        (ROWS, ["--user", "userId"], "no column 'userId': it has user_id, item_id, timestamp; name yours with --user"),
        (ROWS, ["--order", "time"], '(--order "": as in the file)'),
        ({"rows.csv": "user_id,item_id,item_id\na,1,2\n"}, ["--order", ""], "more than one column 'item_id'"),
        ({"rows.csv": "user_id\n1\n"}, [], "no tab, comma, |, ; or ::"),
        ({"rows.csv": b"user_id,item_id,timestamp\na,\xe9,1\n"}, [], "is not UTF-8 text"),
        ({"rows.csv": "user_id,item_id,timestamp\n"}, [], "has no row with a user and an item"),
        ({"rows.csv": "user_id,item_id,timestamp\na,b,1\na,b,c,2\n"}, [], "line 3: more than 3 values"),
        ({"rows.csv": "user_id::item_id::timestamp\na::b::1\na::b:c::2\n"}, [], "line 3: more than 3 values: put text"),
        ({"rows.csv": 'user_id,item_id,timestamp\na,b,1\na,"b,c",2\n'}, [], "line 3: item_id 'b,c' cannot stand"),
        ({"rows.csv": "user_id,item_id,timestamp\na,<UNK>,1\n"}, [], "line 2: item_id '<UNK>' cannot stand"),
        ({"rows.csv": "user_id,item_id,timestamp\na,item_0,1\n"}, [], "has an item item_0"),
        ({"rows.csv.gz": b"not gzip"}, [], "cannot be read as a table"),
        (ROWS, ["--columns", "user_id,item_id,timestamp"], "begins with column names, 'user_id,item_id,timestamp': le"),
        (ROWS, ["--columns", "u,i"], "has 3 columns in its first line, but you name 2: name each"),
        (ROWS, ["--task", "click later"], "is not of the form"),
        (ROWS, ["--task", "a-b=later"], "is not of the form"),
        (ROWS, ["--task", "click=later", "--task", "click=later"], "is taken: give it another name"),
        (ROWS, ["--task", "pretrain=later"], "is taken: give it another name"),
        (ROWS, ["--task", "click=later", "--history", "1"], "with --history 1 no row is later"),
        (ROWS, ["--task", "click=later where timestamp > 99"], "no target is left: check its source and condition"),
        (ROWS, ["--task", "click=later where item_id == 'a9'"], "one target only"),
        (ROWS, ["--task", "click=later where stars > 3"], "name 'stars' is not defined (rows.csv has user_id, item_id"),
        (ROWS, ["--task", "click=later where timestamp > (3"], "condition 'timestamp > (3'"),
        (ROWS, ["--task", "click=later where timestamp = 3"], "is no comparison of columns"),
        (ROWS, ["--task", "click=later where item_id > 3"], "condition 'item_id > 3'"),
        (ROWS, ["--task", "click=later where timestamp == '2024-01-01'"], "timestamp holds numbers, which '2024-"),
        (ROWS, ["--task", "click=later where item_id == 3"], "item_id holds text, such as 'a0', which 3 cannot"),
        (ROWS, ["--task", "click=later where item_id in [3]"], "item_id holds text, such as 'a0', which [3] cannot"),
        (ROWS, ["--task", "click=later where timestamp == item_id"], "timestamp holds numbers, item_id text"),
        (ROWS, ["--task", "click=rows.csv"], "is --interactions itself: write click=later"),
        (ROWS, ["--task", "click=nowhere.csv"], "nowhere.csv: no such file; or write `later`"),
        (ROWS, ["--task", "age=users.age"], "give --users"),
        (USERS, ["--users", "users.csv", "--task", "sex=users.sex"], "no column 'sex': it has user_id, age"),
        (ROWS | {"b.csv": table([("a", "x", "2024-01-01")])}, ["--task", "b=b.csv"], "one is ordered by dates"),
        (ROWS, ["--min_rows", "11"], "no user is left"),
        (ROWS, ["--where", "timestamp > 99"], "no user is left"),
        ({"rows.csv": table([("a", *"x7")] * 9)}, [], "or none before the cut: see --min_rows, --history, --order"),
        (ROWS, ["--length", "9999"], "a line of a task file holds 10,000 tokens"),
        (ROWS, ["--history", "1.5"], "--history 1.5 makes no sense"),
    ],
)
def test_unusable_input_is_refused_in_one_line(refused, tables, flags, complaint):
    assert complaint in refused(tables, *flags)


def small(header: str, row: str, separator: str = ",") -> str:
    """Twenty rows of each of six users; `row` is a format of user, item, time and a rating from 1 to 5."""
    lines = [header] if header else []
    for user, time in itertools.product(range(1, 7), range(20)):
        values = {"item": user * 20 + time, "time": time + 100, "rating": 1 + (user + time) % 5, "one": time % 2}
        lines.append(row.format(user=user, **values))
    return "\n".join(lines).replace(",", separator) + "\n"


# The tables that the commands of Data/README.md read, by file name.
TABLES = {
    "orders.csv": small("customer,article,date,price", "{user},{item},2024-01-01 00:00:00.{time},9"),
    "returns.csv": small("customer,article,date,pieces", "{user},{item},2025-01-01,{rating}"),
    "customers.csv": "customer,region\n1,north\n2,south\n3,\n4,north\n5,south\n6,east\n",
    "ml-1m/ratings.dat": small("", "{user},{item},{rating},{time}", "::"),
    "ml-1m/users.dat": "".join(f"{user}::{'FM'[user % 2]}::{25 * (1 + user % 2)}::10::48067\n" for user in range(1, 7)),
    "ml-100k/u.data": small("", "{user},{item},{rating},{time}", "\t"),
    "ml-100k/u.user": "".join(f"{u}|24|{'FM'[u % 2]}|{('artist', 'other')[u % 2]}|85711\n" for u in range(1, 7)),
    "ml-25m/ratings.csv": small("userId,movieId,rating,timestamp", "{user},{item},{rating}.0,{time}"),
    "QB-video.csv": small(
        "user_id,item_id,click,follow,like,share,video_category,watching_times,gender,age",
        "{user},{item},1,0,{one},0,1,1,{user},{user}",
    ),
    "QB_pair.csv": small("user_id,item_id,timestamp", "{user},{item},{time}"),
    "TN_pair.csv": small("user_id,item_id,timestamp", "{user},TN{item},{time}"),
    "MicroLens-100k_pairs.csv": small("user,item,timestamp", "{user},{item},1583378629{time}"),
    "Pixel200K.csv": small("item_id,user_id,timestamp", "v{item},{user},{time}"),
    "ml-100k.inter": small(
        "user_id:token,item_id:token,rating:float,timestamp:float", "{user},{item},{rating},{time}", "\t"
    ),
    "ml-100k.user": "user_id:token\tgender:token\n" + "".join(f"{user}\t{'FM'[user % 2]}\n" for user in range(1, 7)),
}


def commands() -> list[str]:
    """The commands of this script in Data/README.md."""
    blocks = re.findall(r"^```\n(.*?)^```", (ROOT / "Data/README.md").read_text(), re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith(f".venv/bin/python -m {SCRIPT}")]


def test_the_readme_has_a_command_for_each_of_the_usual_data_sets():
    assert len(commands()) == 9
    named = " ".join(commands())
    assert [name for name in TABLES if name not in named] == []


@pytest.mark.parametrize("command", commands(), ids=lambda command: command.split()[4])
def test_a_command_of_the_readme_makes_files_that_the_scripts_can_read(tmp_path, monkeypatch, run_here, command):
    monkeypatch.chdir(tmp_path)
    for name, content in TABLES.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(content)
    code, _, error = run_here(*shlex.split(command)[2:])
    assert code == 0, error
    names = re.findall(r"(\w+)=", " ".join(re.findall(r'--task "(\w+=)', command)))
    items = data_loader.load_sequences(f"Data/Session/{file_of('pretrain')}", data_loader.Split(0.5)).items
    for name in names:
        data = data_loader.load_examples(f"Data/Session/{file_of(name)}", data_loader.Split(0.7), items)
        assert len(data.rows) == len(Path(f"Data/Session/users_{name}.csv").read_text().splitlines()), name
    assert len(names) >= 1 and len(list(Path("Data/Session").iterdir())) == 2 * (1 + len(names))
