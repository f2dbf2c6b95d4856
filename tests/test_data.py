"""Files → ids → examples; negative samplers."""

import os
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from conure import line_reader, samplers
from conure.errors import InputError
from conure.files import load_sealed, save_sealed
from conure.samplers import LogUniformSampler, TargetSampler
from conure.vocabulary import Vocabulary, read_index

import numpy as np
import pytest
import torch

import data_loader
from data_loader import Split


def sequences(tmp_path: Path, content: str | bytes, **arguments) -> data_loader.TaskData:
    path = tmp_path / "task1.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return data_loader.load_sequences(str(path), Split(0.5), **arguments)


def tokens(data: data_loader.TaskData) -> list[list[str]]:
    rows = np.column_stack([data.rows[data.users], data.targets])
    return [[data.items.tokens[id] for id in row] for row in rows]


def test_reading_in_chunks_equals_splitting_each_line(tmp_path, monkeypatch):
    monkeypatch.setattr(line_reader, "CHUNK_BYTES", 100)  # so that chunks end within lines and tokens
    monkeypatch.setattr(data_loader, "BLOCK_IDS", 60)
    random = np.random.default_rng(1)
    names = ["0", "7", "77", "a b", "ä", "longer than eight bytes", "longer than eight bytez", "x" * 256]
    lines = [[names[i] for i in random.integers(0, len(names), random.integers(1, 9))] for _ in range(300)]
    data = sequences(tmp_path, "".join(",".join(line) + "\n" for line in lines))
    assert tokens(data) == [["0"] * (8 - len(line)) + line for line in lines]
    assert data.items.tokens == ["<UNK>", *dict.fromkeys(token for line in lines for token in line)]


@pytest.mark.parametrize(
    "distinct",
    [
        ["7", "70", "700", "1", "10", "16777216", "16777217", "16777215", "99999999", "0", "2"],
        ["7", "07", "007", "0", "00", "70", "1"],
        ["12345678", "123456789", "1234567812345678", "12345678a", "8", "é", "é8", "1a", "a1"],
        ["5", "+5", "-5", "5.0", "5e0", "0x5", "1_0", "10", "NA", "nan", "null", "True", "#5", "'5'", "٥"],
        ["9223372036854775807", "9223372036854775808", "99999999999999999999", "999999999999999999", "7"],
    ],
)
def test_different_tokens_have_different_ids(tmp_path, monkeypatch, distinct):
    """Also in small chunks, so that tokens of earlier chunks are looked up in later ones."""
    rows = [[token, token] for token in distinct + distinct[::-1]] + [distinct[:2]]
    for size in (8, 1 << 24):
        monkeypatch.setattr(line_reader, "CHUNK_BYTES", size)
        data = sequences(tmp_path, "".join(",".join(row) + "\n" for row in rows))
        assert data.items.tokens == ["<UNK>", *distinct]
        assert tokens(data) == rows


def test_short_rows_are_padded_on_the_left_and_zero_is_the_last_item_if_the_file_has_none(tmp_path):
    data = sequences(tmp_path, "1,2,3\n4\n5,6\n1,2\n")
    assert tokens(data) == [["1", "2", "3"], ["0", "0", "4"], ["0", "5", "6"], ["0", "1", "2"]]
    assert data.padding_id == len(data.items) - 1 == 7
    assert sequences(tmp_path, "1,2\n" * 4).padding_id == -1


@pytest.mark.parametrize("begin, end", [("", ""), ("\ufeff", "\n"), ("\n", "\n\n")])
@pytest.mark.parametrize(
    "comma, newline", [(",", "\n"), (",", "\r\n"), (",", ",\n"), (",", "\n\n \n"), (" ,\t", "\t\n ")]
)
def test_variants_of_the_format_are_read_alike(tmp_path, begin, end, comma, newline):
    """Byte-order mark, Windows line ends, no final line end, trailing commas, empty lines, spaces around tokens."""
    lines = [list("123"), list("456"), list("789"), list("123")]
    assert tokens(sequences(tmp_path, begin + newline.join(map(comma.join, lines)) + end)) == lines


def test_parallel_writers_of_one_file_leave_a_whole_file(tmp_path):
    path = str(tmp_path / "shared.pt")

    def write(value: int) -> bool:
        save_sealed(path, {"numbers": torch.full((50_000,), value)})
        content, _ = load_sealed(path)
        return content is not None and len(content["numbers"].unique()) == 1

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(write, range(60)))
    assert os.listdir(tmp_path) == ["shared.pt"]


def test_each_target_of_a_later_task_is_one_example(tmp_path):
    path = tmp_path / "task2.csv"
    path.write_text("1,2,,x\n9,3,,y,x\n")
    items = Vocabulary(["<UNK>", "1", "2", "3"])
    data = data_loader.load_examples(str(path), Split(0.67), items)
    assert data.rows[data.users].tolist() == [[1, 2, 0], [0, 3, 0], [0, 3, 0]]
    assert data.targets.tolist() == [1, 2, 1] and data.target_vocabulary.tokens == ["<UNK>", "x", "y"]
    assert data.unknown_items == 1
    assert data.describe()[-1] == "not in the vocabulary, read as <UNK>: 1 of 6 items, 0 of 3 targets"
    again = data_loader.load_examples(str(path), Split(0.67), items, Vocabulary(["<UNK>", "y", "z"]))
    assert again.targets.tolist() == [0, 1, 0] and again.unknown_targets == 2


@pytest.mark.parametrize(
    "content, complaint",
    [
        ("1,2,,3\n4,5\n", "line 2: no `,,` between the sequence and its targets: '4,5'"),
        ("1,2,,3\n\n4,5,,\n", "line 3: no target after `,,`: '4,5,,'"),
        (",,3\n1,2,,3\n", "line 1: no item before `,,`: ',,3'"),
        ("1,2,,3\n1,2,,3,,4\n", "line 2: an empty item or target besides the `,,`"),
        (b"1,2,,3\n1,\xff,,3\n", "line 2: not UTF-8 text"),
        (b"1,2,,3\n1,\0,,3\n", "line 2: a control character"),
        ("1,2,,3\n1\t2\t,,3\n", "line 2: a tab or carriage return inside a token: '1\\t2\\t,,3'"),
        ("1,2,,3\r1,2,,3\r", "line 1: a tab or carriage return inside a token"),
        ("1,2,,3\n" + "1," * 10000 + ",3\n", "line 2: more than 10,000 tokens"),
        ("1,,2\n" + "1" * 300 + ",,2\n", "line 2: a token of more than 256 bytes"),
        ("", "is empty"),
        ("\n \n\n", "is empty"),
        ("1,2,,3\n" * 9, "all targets are the same"),
        ("1,2,,3\n1,2,,4\n", "too few to hold out"),
        ("1,2,0,0,,x\n3,0,0,0,,y\n4,5,6,7,,x\n", "line 1: padding (`0`) at the end, as in 2 of 3 lines"),
        ("1,2,,x\n0,0,,y\n0,0,,x\n", "line 2: nothing but padding (`0`), as in 2 of 3 lines"),
        ("1,1,,x\n1,,y\n1,1,,y\n1,1,,x\n", "line 1: only the item `1`, as in every line"),
        ("history,,target\n1,2,,x\n2,,y\n", "line 1: a header"),
        ('"1","2",,"x"\n"2","1",,"y"\n', "line 1: quotes around tokens"),
        ('1,2,,"x"\n2,1,,"y"\n', "line 1: quotes around tokens"),
    ],
)
def test_malformed_lines_of_a_later_task_are_refused(tmp_path, content, complaint):
    path = tmp_path / "task2.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(InputError) as error:
        data_loader.load_examples(str(path), Split(0.5), Vocabulary(["<UNK>", *"0123456789"]))
    assert complaint in str(error.value) and "\n" not in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize(
    "content, complaint",
    [
        ("1,2,,3\n4,5,6\n", "line 1: an empty item (`,,` belongs to the files of tasks 2 and later): '1,2,,3'"),
        ("1\n2\n3\n4\n", "line 1: one item only, as in every line: give sequences of several items"),
        ("1,2,3,0\n4,5,0,0\n6,7,8,0\n1,2,3,4\n", "line 1: padding (`0`) at the end, as in 3 of 4 lines: remove it"),
        ("1,2,3\n4,5,6\n" * 8 + "1,0,0\n" * 3, "line 17: padding (`0`) at the end, as in 3 of 19 lines"),
        ("1,2,3\n" + "0,0,0\n" * 3, "line 2: nothing but padding (`0`), as in 3 of 4 lines"),
        ("7,7,7\n" * 4, "line 1: one item only, as in every line"),
        ("\n7,7,7\n8,8,8\n9,9\n0,0,5\n", "line 2: one item only, as in every line"),
        ("user,item,rating,day\n1,2,3.5,2001-01-31\n2,1,-1,2001-01-30\n", "line 1: a header"),
        ("user_id,item_id\n1,2\n3,4\n5,6\n", "line 1: a header, which would be read as a user; remove this line: "),
        ('"1","2"\n"3","4"\n"5","6"\n', "line 1: quotes around tokens would become part of them; write the file"),
        ('0,0,"a b"\n0,"c","d"\n"e","f","g"\n', "line 1: quotes around tokens"),
        ('"1,2"\n"3,4"\n"5,6"\n', "line 1: quotes around tokens"),
    ],
)
def test_malformed_lines_of_task_1_are_refused(tmp_path, content, complaint):
    with pytest.raises(InputError) as error:
        sequences(tmp_path, content)
    assert complaint in str(error.value) and f"{tmp_path}/task1.csv, line " in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        "0,1,0\n1,0,1\n1,1,0\n0,0,1\n",  # `0` as an item, as often first as last
        "1,1,0\n2,1,0\n3,1,0\n0,1,2\n0,2,1\n",
        "1,2,3\n4,5,0\n6,0,0\n4,0,5\n",
        "0,0,1\n0,2,3\n4,5,6\n0,8,0\n",
        'quo"ted,a\n"Heroes",b\n",c\n"d,e"\n',
        "a,b\nc,7\n8,9\n1,2\n",
        "item,other\n1,2\n3,x\n4,5\n",
        "7,7\n8,8\n8,9\n9,9\n",
    ],
)
def test_unusual_but_valid_files_are_read_without_a_note(tmp_path, content):
    data = sequences(tmp_path, content)
    assert tokens(data) == [line.split(",") for line in content.split()] and data.notes == []


def test_a_few_rows_of_padding_alone_are_noted(tmp_path):
    data = sequences(tmp_path, "1,2,3\n0,0,0\n4,5,6\n7,8,9\n")
    assert data.describe()[-1] == f"{tmp_path}/task1.csv, line 2: nothing but padding (`0`), as in 1 of 4 lines"


def test_a_missing_relative_path_is_named_with_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path, said in (("no.csv", f"no.csv does not exist in {tmp_path}: "), ("/no.csv", "/no.csv does not exist: ")):
        for load in (lambda path: data_loader.load_sequences(path, Split(0.2)), read_index):
            with pytest.raises(InputError) as error:
                load(path)
            assert str(error.value).startswith(said)


def test_a_big_file_takes_at_most_three_times_its_array(tmp_path, monkeypatch):
    """Files of numbers, of text, and of rows of unequal length."""
    monkeypatch.setattr(line_reader, "CHUNK_BYTES", 1 << 16)
    ids = np.random.default_rng(1).integers(1, 1000, (20_000, 20)).astype(str).tolist()
    for rows in (ids, [row[place % 15 :] for place, row in enumerate(ids)], [["a b", *row] for row in ids]):
        content = "".join(",".join(row) + "\n" for row in rows)
        tracemalloc.start()
        data = sequences(tmp_path, content)
        peak = tracemalloc.get_traced_memory()[1] - len(content)
        tracemalloc.stop()
        assert peak < 3 * (data.rows.nbytes + data.targets.nbytes)


def test_the_index_is_written_and_read_back(tmp_path):
    path = str(tmp_path / "index.csv")
    items = Vocabulary(["<UNK>", 'quo"ted', "NA", "007", "ä", "it's", "back\\slash"])
    items.write(path)
    items.check_index(path)
    assert Path(path).read_text().splitlines()[:2] == ["token,id", "<UNK>,0"]
    assert read_index(path).ids == items.ids
    assert Vocabulary.from_tensor(items.to_tensor()).tokens == items.tokens


def test_the_index_of_other_data_is_refused(tmp_path):
    """Because checkpoints made with it could not be trained further without it."""
    path = tmp_path / "index.csv"
    Vocabulary(["<UNK>", "a", "b"]).write(str(path))
    with pytest.raises(InputError, match=r"ids of other data.* another --index_path"):
        Vocabulary(["<UNK>", "b", "a"]).check_index(str(path))


@pytest.mark.parametrize(
    "content, reason",
    [(content, "") for content in ("", "\0", "{" * 9999, "{'<UNK>': 0, 'a': 1}", "what,ever\n1,2\n")]
    + [(f"token,id\n{rows}", "") for rows in ("", "a,0\n", "<UNK>,zero\n")]
    + [(f"token,id\n<UNK>,0\n{rows}", "") for rows in ("a,1\na,2\n", "a\n", "a,1,1\n", '"a\nb",1\n')]
    + [(f"token,id\n<UNK>,0\na,{id}\n", f"line 3: the id must be 1, not '{id}'") for id in ("2", "9" * 20)],
)
def test_a_malformed_index_is_refused_with_harmless_advice(tmp_path, content, reason):
    path = tmp_path / "index.csv"
    path.write_text(content)
    with pytest.raises(InputError, match=f"is no item index .*{reason}") as error:
        read_index(str(path))
    advice = f"run `python conure_tp_t1.py --index_path {path}` with its other flags as before"
    assert advice in str(error.value) and "overwrite" not in str(error.value)


def test_log_uniform_negatives_are_distinct_and_match_expected_counts():
    sampler, generator, draws = LogUniformSampler(40, 0.25), torch.Generator().manual_seed(1), 4000
    counts, expected = torch.zeros(40), torch.zeros(40)
    for _ in range(draws):
        ids, tries = sampler.draw(generator)
        assert len(ids) == len(ids.unique()) == 10 and tries >= 10
        counts[ids] += 1
        expected -= torch.expm1(tries * sampler.log_miss).float()  # the probability of being drawn at least once
    np.testing.assert_allclose(counts / draws, expected / draws, atol=0.03)


def test_first_places_are_the_same_by_both_ways():
    ids = torch.randint(50, (200,), generator=torch.Generator().manual_seed(1))
    found = samplers.first_places(ids, 50)
    assert found.tolist() == sorted(ids.tolist().index(each) for each in set(ids.tolist()))
    assert torch.equal(samplers.first_places_by_sorting(ids), found)


def test_target_negatives_follow_the_probabilities_and_are_never_the_positive():
    sampler, generator = TargetSampler(np.array([0.5, 0.3, 0.0, 0.2])), torch.Generator().manual_seed(1)
    for positive in (1, 2, 4):
        drawn = sampler.draw(torch.full((20000,), positive), generator)
        share = torch.bincount(drawn, minlength=5) / 20000
        expected = torch.tensor([0, 0.5, 0.3, 0.0, 0.2])
        expected[positive] = 0
        torch.testing.assert_close(share, expected / expected.sum(), rtol=0, atol=0.015)


def test_a_sharp_sampler_has_probabilities():
    probabilities = samplers.static_probabilities(np.array([1, 2, 2, 3]), 4, rho=1e-7)
    assert probabilities.tolist() == [0, 1, 0]


def test_padding_that_task_1_never_saw_is_counted_as_unknown(tmp_path):
    path = tmp_path / "task2.csv"
    path.write_text("1,2,,x\n1,,y\n1,2,,y\n1,2,,x\n")
    assert data_loader.load_examples(str(path), Split(0.5), Vocabulary(["<UNK>", "1", "2"])).unknown_items == 1


def test_sampling_ends_even_if_the_positive_has_almost_all_probability():
    sampler = TargetSampler(np.array([1 - 1e-12, 1e-12]))
    assert (sampler.draw(torch.ones(100, dtype=torch.int64), torch.Generator().manual_seed(1)) == 2).all()


def test_a_split_by_user_keeps_each_user_in_one_part(tmp_path):
    path, items = tmp_path / "task2.csv", Vocabulary(["<UNK>", *map(str, range(1, 9))])
    path.write_text(
        "".join(f"{1 + user % 8},{1 + user % 5},,{','.join('abc'[: 1 + user % 3])}\n" for user in range(40))
    )
    splits = []
    for split in (Split(0.25, by="user"), Split(0.25, by="user"), Split(0.25, seed=11, by="user"), Split(0.25)):
        data = data_loader.load_examples(str(path), split, items)
        parts = [data.splits[name] for name in ("train", "validation", "test")]
        assert sorted(np.concatenate(parts)) == list(range(len(data.targets)))
        assert data.splits["heldout"].tolist() == [*parts[1], *parts[2]]
        users = [set(data.users[part]) for part in parts]
        assert (sum(map(len, users)) == 40) == (split.by == "user")
        if split.by == "user":
            assert [*map(len, users)] == [30, 5, 5]
        splits.append([set(part) for part in parts])
    first, again, other, _ = splits
    assert first == again != other


def test_too_few_users_to_hold_out_are_refused(tmp_path):
    path = tmp_path / "task2.csv"
    path.write_text("1,2,,a,b,c\n2,1,,a,b,c\n2,2,,b\n")
    with pytest.raises(InputError, match="3 users are too few to hold out"):
        data_loader.load_examples(str(path), Split(0.4, by="user"), Vocabulary(["<UNK>", "1", "2"]))
