"""Clients' own files become clients: names, one label map, splits; what is wrong with a file is said with its name."""

import json
import re
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset

from hf_fedmoe import FederatedDataset
from hf_fedmoe.data.own_files import read_texts
from hf_fedmoe.data.own_labels import in_natural_order
from tests.data_room.test_sources import own_cache_and_no_network  # noqa: F401


TEXTS = {"north": ["a fine coat", "a poor coat", "so so"], "south": ["red hat", "blue hat", "no hat"]}


def csv(path: Path, texts: list[str], stars: list, heading: str = "id,review,stars") -> str:
    lines = [f'{row},"{text}",{label}' for row, (text, label) in enumerate(zip(texts, stars, strict=True))]
    path.write_text("\n".join([heading, *lines]) + "\n")
    return str(path)


@pytest.fixture
def files(tmp_path):
    return {
        "north": csv(tmp_path / "north.csv", TEXTS["north"], [10, 2, 2]),
        "south": csv(tmp_path / "south.csv", TEXTS["south"], [1, 2, 10]),
    }


def of_files(files, **changes):
    return FederatedDataset.from_files(files, **{"text": "review", "label": "stars", **changes})


def rows_of(data: Dataset) -> list[tuple[str, str]]:
    names = data.features["label"].names
    return [(row["text"], names[row["label"]]) for row in data]


def test_files_become_clients_of_one_label_map(files):
    data = of_files(files)
    assert data.client_names == ["north", "south"] and data.pool.column_names == ["text", "label"]
    # Numbers by their value; the north has no 1.
    assert data.label_names == ["1", "2", "10"]
    assert rows_of(data.client("north")) == list(zip(TEXTS["north"], ["10", "2", "2"], strict=True))
    assert rows_of(data.client("south")) == list(zip(TEXTS["south"], ["1", "2", "10"], strict=True))
    assert data.reserved is None and data.test is None
    assert "client north" in data.summary()


def test_a_list_names_clients_by_their_files(files, tmp_path):
    assert of_files(list(files.values())).client_names == ["north", "south"]
    named = [f"hill={files['north']}", Path(files["south"])]
    assert of_files(named).client_names == ["hill", "south"]
    (tmp_path / "other").mkdir()
    twin = csv(tmp_path / "other" / "north.csv", ["one"], [2])
    with pytest.raises(ValueError, match="Clients 0 and 1 are both called 'north'"):
        of_files([files["north"], twin])
    with pytest.raises(ValueError, match=r"Clients 'a' and 'b' both have '.*north.csv': give each its own"):
        of_files({"a": files["north"], "b": files["north"]})


@pytest.mark.parametrize("stars", [[1.0, 2.0, 10.0], ["1", " 2", "10 "], [1, 2, 10]])
@pytest.mark.parametrize("kind", ["parquet", "jsonl", "json"])
def test_formats_and_ways_to_write_a_number_agree(files, tmp_path, kind, stars):
    path = tmp_path / f"south.{kind}"
    columns = {"review": TEXTS["south"], "stars": stars}
    if kind == "parquet":
        pq.write_table(pa.table(columns), path)
    else:
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        path.write_text("\n".join(map(json.dumps, rows)) if kind == "jsonl" else json.dumps(rows))
    data = of_files({"north": files["north"], "south": str(path)})
    assert rows_of(data.client("south")) == list(zip(TEXTS["south"], ["1", "2", "10"], strict=True))


def test_words_booleans_and_named_classes_are_labels(tmp_path):
    words = csv(tmp_path / "a.csv", list("abc"), ["None", "grade 10", "grade 2"])
    assert of_files([words]).label_names == ["grade 2", "grade 10", "None"]
    truths = csv(tmp_path / "b.csv", list("abc"), ["True", "False", "True"])
    assert of_files([truths]).label_names == ["False", "True"]
    named = Dataset.from_dict({"review": list("ab"), "stars": [1, 0]}).cast_column(
        "stars", ClassLabel(names=["x", "y"])
    )
    named.to_parquet(str(tmp_path / "c.parquet"))
    assert rows_of(of_files([str(tmp_path / "c.parquet")]).client(0)) == [("a", "y"), ("b", "x")]


def test_natural_order():
    assert in_natural_order({"10", "9", "-1"}) == ["-1", "9", "10"]
    assert in_natural_order({"b10", "b9", "a"}) == ["a", "b9", "b10"]


def test_told_classes_have_their_order_and_may_be_in_no_file(files):
    data = of_files(files, classes=[10, 5, 2, 1])
    assert data.label_names == ["10", "5", "2", "1"] and data.label_counts().tolist() == [[1, 0, 2, 0], [1, 0, 1, 1]]
    with pytest.raises(ValueError, match=r"`stars` of '.*north.csv' is '10' in row 1, which classes has not: is"):
        of_files(files, classes=["1", "2", "100"])
    with pytest.raises(ValueError, match=r"classes is \['1', '1'\]: give a list of at least two different"):
        of_files(files, classes=["1", "1"])


def test_splits_of_files_of_their_own(files, tmp_path):
    held = csv(tmp_path / "held.csv", ["held one", "held ten", "held two"], [1, 10, 2])
    data = of_files(files, reserved=held, test=Path(csv(tmp_path / "test.csv", ["test two"], [2])))
    assert rows_of(data.reserved) == [("held one", "1"), ("held ten", "10"), ("held two", "2")]
    assert rows_of(data.test) == [("test two", "2")]
    assert data.client_sizes.tolist() == [3, 3]


def test_splits_by_share_leave_each_row_once_and_follow_the_seed(tmp_path):
    texts = [f"text {row}" for row in range(90)]
    files = {
        "north": csv(tmp_path / "north.csv", texts[:60], ["x", "x", "y"] * 20),
        "south": csv(tmp_path / "south.csv", texts[60:], ["x", "y", "y"] * 10),
    }
    data = of_files(files, reserved=0.1, test=18, validation=0.1, seed=3)
    assert [len(data.reserved), len(data.test), len(data.validation)] == [9, 18, 9]
    # 50 of 90 are x, which every split keeps.
    assert np.bincount(data.test["label"]).tolist() == [10, 8]
    parts = [data.client("north"), data.client("south"), data.reserved, data.test, data.validation]
    assert sorted(text for part in parts for text in part["text"]) == sorted(texts)
    assert set(data.client("north")["text"]) <= set(texts[:60])
    same, other = (of_files(files, reserved=0.1, test=18, validation=0.1, seed=seed) for seed in (3, 4))
    assert same.test["text"] == data.test["text"] and other.test["text"] != data.test["text"]
    assert same.state_fingerprint() == data.state_fingerprint()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"text": "reveiw"}, r"north.csv' has no column 'reveiw' for text: is it 'review'\? It has 'id', 'review'"),
        ({"label": "Stars"}, r"no column 'Stars' for label: is it 'stars'\?"),
        ({"text": "id"}, r"`id` of '.*north.csv' holds int64, 0 in row 1, and no texts"),
        ({"label": "review"}, "text and label are both 'review'"),
        ({"reserved": 1.5}, r"The reserved size is 1.5, but must be a number of rows or a share in \[0, 1\)"),
        ({"test": 6}, "The test size is 6, but only 6 of 6 rows remain"),
        ({"test": "tset.csv"}, "There is no file 'tset.csv' of 'test': check the path"),
    ],
)
def test_what_is_asked_for_wrongly_is_said(files, changes, said):
    with pytest.raises(ValueError, match=said):
        of_files(files, **changes)


@pytest.mark.parametrize("sign", [";", "\t", "|"])
def test_columns_may_be_separated_as_spreadsheets_do(tmp_path, sign):
    south = tmp_path / "south.csv"
    rows = [["review", "stars", "note"], ["fine, but late", "2", ""], [f"so{sign} so", "10", "x"]]
    quoted = "\n".join(sign.join(f'"{value}"' if sign in value else value for value in row) for row in rows)
    south.write_bytes("\ufeff".encode() + quoted.replace("\n", "\r\n").encode())  # as spreadsheets write it
    north = csv(tmp_path / "north.csv", ["dull", "long"], [10, 2])
    data = FederatedDataset.from_files({"south": str(south), "north": north}, text="review", label="stars")
    assert data.pool["text"][:] == ["fine, but late", f"so{sign} so", "dull", "long"]
    assert data.label_names == ["2", "10"] and data.pool["label"][:] == [0, 1, 1, 0]


def test_commas_go_before_other_signs_in_names(tmp_path):
    path = tmp_path / "south.csv"
    path.write_text("review,stars;of us\nfine; late,1\ndull,2\n")
    data = FederatedDataset.from_files([str(path)], text="review", label="stars;of us")
    assert data.pool["text"][:] == ["fine; late", "dull"]
    path.write_text('"review;all"\nfine\ndull\n')  # one column
    assert read_texts(str(path), "review;all") == ["fine", "dull"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "south.csv' has no rows"),
        ("review,stars\n", "south.csv' has no rows"),
        ("review;stars|x\ngood;1\n", r"has one column, 'review;stars\|x', with ';' and '\|' in its name: separate"),
        (
            "review;stars|x\nfine;1\nbad, dear, late;2\n",
            r"south.csv' begins with 'review;stars\|x', whose columns may be separated by ';' or '\|': save it with",
        ),
        ("review;stars\nfine;1\nbad; dear; late;2\n", r"Expected 2 fields in line 3, saw 4\. Check that the file"),
        ("review;stars\nfine; but late;1\ndull; and long;2\n", r"'review;stars': put texts with ';' into quotes"),
        ("review;review;stars\nfine;so;1\n", r"south.csv' has 2 columns 'review': give each a name of its own"),
        ("review,stars\nfine,1\nbad,2,3,4\n", r"Expected 2 fields in line 3, saw 4\. Check that the file is whole"),
        ("review,stars\nfine, but late,1\ndull, and long,2\n", r"more values in each row than names in its first"),
        ('review,stars\nfine,1\n"  ",2\n', r"`review` of '.*south.csv' is empty in 1 of 2 rows, row 2 first"),
        ("review,stars\nfine,1\nbad,\n", r"`stars` of '.*south.csv' is empty in 1 of 2 rows, row 2 first"),
        ("review,stars\nfine,1\nbad,2.5\n", r"is 2.5 in row 2: numbers that are not whole are no classes"),
        ("review,stars\nfine,inf\nbad,2\n", r"is inf in row 1: numbers that are not whole are no classes"),
        (
            "review,stars\nfine,1\nbad,two\n",
            r"`stars` of '.*south.csv' is 'two' in row 2, while most labels are numbers \(1, 2, 10\): write it as",
        ),
    ],
)
def test_what_is_wrong_in_a_file_is_said_with_its_name(files, content, said):
    Path(files["south"]).write_text(content)
    with pytest.raises(ValueError, match=said):
        of_files(files)


def test_all_that_is_wrong_is_said_at_once(files, tmp_path):
    Path(files["north"]).write_text("review,stars\n,1\nbad,\n")
    files["east"] = csv(tmp_path / "east.csv", ["a"], [1], heading="id,message,category")
    with pytest.raises(ValueError) as refused:
        of_files(files)
    texts, labels, columns = str(refused.value).split("\n")
    assert re.search(r"`review` of '.*north.csv' is empty in 1 of 2 rows, row 1 first", texts)
    assert re.search(r"`stars` of '.*north.csv' is empty in 1 of 2 rows, row 2 first", labels)
    said = "has no column 'review' for text: it has 'id', 'message', 'category'. All files name their columns alike: "
    assert said + "name one that is there (--text_column), or rename it." in columns
    many = [csv(tmp_path / f"{row}.csv", ["a"], [1], heading="id,message,category") for row in range(5)]
    with pytest.raises(ValueError, match="And so on: 5 files are wrong") as refused:
        of_files(many)
    assert str(refused.value).count("has no column") == 3


def test_labels_of_several_types_are_refused(tmp_path):
    path = tmp_path / "mixed.jsonl"
    path.write_text('{"review": "a", "stars": 1}\n{"review": "b", "stars": "x"}\n')
    with pytest.raises(ValueError, match=r"`stars` of '.*mixed.jsonl' holds values of several types: a label"):
        of_files([str(path)])


def test_paths_that_are_none_are_refused(files, tmp_path):
    with pytest.raises(ValueError, match=r"There is no file 'zürich.csv' of 'zürich': check the path, from"):
        of_files({"zürich": "zürich.csv"})  # which has the ending, and little else, in common with north.csv
    near = str(tmp_path / "nort.csv")
    with pytest.raises(ValueError, match=rf"There is no file '{re.escape(near)}' of 'north': is it '.*north.csv'\?"):
        of_files({"north": near, "south": files["south"]})
    with pytest.raises(ValueError, match=r"is a folder: give a file of .parquet, .csv, .json, .jsonl, or folders of"):
        of_files({"north": str(tmp_path)})
    (tmp_path / "north.xlsx").touch()
    with pytest.raises(ValueError, match=r"ends in '.xlsx': give a file of .parquet"):
        of_files({"north": str(tmp_path / "north.xlsx")})
    with pytest.raises(ValueError, match=r"clients is 'north.csv': give a path for each client by its name"):
        of_files("north.csv")
    with pytest.raises(ValueError, match="clients is empty"):
        of_files({})


def test_spellings_slips_and_single_classes(tmp_path):
    north = csv(tmp_path / "north.csv", [f"n {row}" for row in range(20)], ["positive", "negative"] * 10)
    south = csv(tmp_path / "south.csv", list("abc"), ["Positive", "negative", "negative"])
    with pytest.raises(
        ValueError, match=r"'positive' in '.*north.csv', 'Positive' in '.*south.csv': write it alike"
    ) as told:
        of_files([north, south])
    assert "classes=['negative', 'Positive', 'positive'] (--classes)." in str(told.value)
    slip = csv(tmp_path / "slip.csv", list("abc"), ["positiv", "negative", "negative"])
    with pytest.warns(UserWarning, match=r"is 'positiv' in 1 row of '.*slip.csv' and nowhere else: is it 'positive'"):
        assert of_files([north, slip]).label_names == ["negative", "positiv", "positive"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert of_files([north, slip], classes=["negative", "positive", "positiv"]).num_labels == 3
    one = csv(tmp_path / "one.csv", list("ab"), ["x", "x"])
    with pytest.raises(ValueError, match="`stars` is 'x' in every row of every file, and one class is nothing to"):
        of_files([one])
    ids = csv(tmp_path / "ids.csv", [f"t {row}" for row in range(150)], list(range(150)))
    with pytest.raises(ValueError, match="`stars` of all files together has 150 different values in 150 rows"):
        of_files([ids])


def test_a_client_that_would_keep_nothing_is_named(tmp_path):
    large = csv(tmp_path / "large.csv", [f"t {row}" for row in range(30)], ["x", "y"] * 15)
    small = csv(tmp_path / "small.csv", ["only"], ["z"])
    with pytest.raises(ValueError, match="All 1 rows of client 'small' went to test, and it has none to train on"):
        of_files({"large": large, "small": small}, test=0.5)
