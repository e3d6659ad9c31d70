import re
import string

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset

from hf_fedmoe.data import (
    CHARACTER_NAMES,
    CHARACTERS,
    FederatedDataset,
    character_inputs,
    decode_characters,
    encode_characters,
    load_rows,
    natural,
    next_character_windows,
)


def test_the_hundred_characters():
    assert string.printable == CHARACTERS and len(set(CHARACTER_NAMES)) == 100
    assert encode_characters("09az AZ").tolist() == [0, 9, 10, 35, 94, 36, 61]
    assert [CHARACTER_NAMES[number] for number in encode_characters("q7,. \n")] == [
        "q",
        "7",
        "comma",
        "full stop",
        "space",
        "newline",
    ]
    assert decode_characters(encode_characters(CHARACTERS)) == CHARACTERS
    assert encode_characters("").shape == (0,) and encode_characters("x").dtype == np.uint8
    for text, place in (("Café", 3), ("\x00", 0), ("to be 🎭", 6)):
        with pytest.raises(ValueError, match=re.escape(f"has {text[place]!r} at place {place}, which")) as error:
            encode_characters(text)
        assert "unicodedata.normalize" in str(error.value)


def test_inputs_are_the_last_characters_padded_on_the_right():
    inputs = character_inputs(["abc", "0123456", ""], length=5)
    assert inputs["input_ids"].tolist() == [[10, 11, 12, 99, 99], [2, 3, 4, 5, 6], [99] * 5]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1] * 5, [0] * 5]
    assert inputs["input_ids"].dtype == torch.int64
    assert character_inputs(["ab" * 60])["input_ids"].shape == (1, 80)


def speeches() -> Dataset:
    """Two roles that take turns, with five lines each, and one who says little."""
    return Dataset.from_dict(
        {
            "who": ["A", "B", "A", "C", "B", "A"],
            "said": ["abcd\nefg  h", "0123\n4567\n8901\n\n2345", "ijkl", "no", "6789", "mnop\nqrstu"],
        }
    )


def windows_of(part: Dataset) -> list[tuple[str, str, str]]:
    return [
        (
            part.features["who"].int2str(row["who"]),
            decode_characters(row["input_ids"]),
            part.features["label"].int2str(row["label"]),
        )
        for row in part
    ]


def test_windows_by_hand():
    parts = next_character_windows(speeches(), length=4, stride=6, text_column="said", role_column="who")
    # A's first four lines are "abcd efg h ijkl mnop", B's are "0123 4567 8901 2345"; C's one line is for the test, and
    # too short, as B's last is.
    assert windows_of(parts["train"]) == [
        ("A", "abcd", "space"),
        ("A", "fg h", "space"),
        ("A", "jkl ", "m"),
        ("B", "0123", "space"),
        ("B", "567 ", "8"),
        ("B", "01 2", "3"),
    ]
    assert windows_of(parts["test"]) == [("A", "qrst", "u")]
    assert parts["train"].features["label"] == ClassLabel(names=CHARACTER_NAMES)
    assert parts["train"].features["input_ids"] == datasets.List(datasets.Value("uint8"), length=4)


def test_every_character_but_the_first_ones_is_a_label_once():
    parts = next_character_windows(speeches(), length=3, text_column="said", role_column="who")
    for role, text in (("A", "abcd efg h ijkl mnop"), ("B", "0123 4567 8901 2345")):
        mine = [window for window in windows_of(parts["train"]) if window[0] == role]
        assert [window for _, window, _ in mine] == [text[i : i + 3] for i in range(len(text) - 3)]
        assert [label.replace("space", " ") for _, _, label in mine] == list(text[3:])
    assert windows_of(parts["test"]) == [("A", "qrs", "t"), ("A", "rst", "u"), ("B", "678", "9")]


@pytest.mark.parametrize(("num_lines", "share", "expected"), [(10, 0.8, 8), (7, 0.8, 6), (2, 0.8, 1), (10, 0.29, 3)])
def test_first_lines_are_for_training(num_lines, share, expected):
    letters = string.ascii_lowercase[:num_lines]
    rows = Dataset.from_dict({"text": ["\n".join(2 * letter for letter in letters)], "role_id": ["A"]})
    parts = next_character_windows(rows, length=1, train_share=share)
    for part, said in (("train", letters[:expected]), ("test", letters[expected:])):
        assert set(decode_characters(np.ravel(parts[part]["input_ids"][:]))) - {" "} == set(said)


def test_roles_are_clients():
    parts = next_character_windows(load_rows("shakespeare"), stride=40)
    train = parts["train"]
    clients = natural(train["role_id"], min_size=100)
    data = FederatedDataset(train, clients, test=parts["test"].select(range(100)))
    roles = [set(data.client(index)["role_id"]) for index in range(data.num_clients)]
    assert all(len(role) == 1 for role in roles) and len(set.union(*roles)) == data.num_clients == 19
    (last,) = roles[-1]
    assert train.features["role_id"] == parts["test"].features["role_id"]
    assert train.features["role_id"].int2str(last) == "The Tragedy of Othello, the Moor of Venice / EMILIA"
    assert data.num_labels == 100 and "space (1" in data.summary()
    assert len(train[0]["input_ids"]) == 80


def test_shipped_plays():
    rows = load_rows("shakespeare")
    assert len(rows) == 3130 and len(set(rows["role_id"])) == 94
    assert {"play", "act", "scene", "role_id", "text"} == set(rows.column_names)
    assert set("".join(rows["text"])) <= set(CHARACTERS)
    assert rows[0]["text"].startswith("As I remember, Adam, it was upon this fashion")


def test_rows_of_any_source(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("HF_FEDMOE_DATA", str(tmp_path))
    speeches().to_parquet(tmp_path / "plays_train.parquet")
    speeches().to_parquet(tmp_path / "plays_test.parquet")
    assert load_rows("plays")["who"] == speeches()["who"][:] * 2
    with pytest.raises(ValueError, match=r"No dataset 'poems'.*reviews, shakespeare"):
        load_rows("poems")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text_column": "text"}, r"text_column is 'text', but the data has the columns \['who', 'said'\]"),
        ({"role_column": "role_id"}, "role_column is 'role_id', but the data has the columns"),
        ({"length": 0}, "length is 0, but must be at least 1"),
        ({"stride": -1}, "stride is -1, but must be at least 1"),
        ({"train_share": 1.0}, "train_share is 1.0, but must lie between 0 and 1"),
        ({"length": 6}, "None of the 3 roles in 'who' says more than length = 6 characters in its lines for test"),
        ({"length": 30}, "None of the 3 roles in 'who' says more than length = 30 characters in its lines for train"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        next_character_windows(speeches(), **{"text_column": "said", "role_column": "who"} | arguments)


def test_missing_values_and_other_characters():
    for column in ("text", "role_id"):
        rows = {"text": ["a", "b"], "role_id": ["A", "B"]}
        rows[column][1] = None
        with pytest.raises(ValueError, match="1 of 2 rows lack 'text' or 'role_id'"):
            next_character_windows(Dataset.from_dict(rows))
    with pytest.raises(ValueError, match="has 'é' at place 0"):
        next_character_windows(Dataset.from_dict({"text": ["été"], "role_id": ["A"]}))
