import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from hf_fedmoe.data import load_source


@pytest.fixture(autouse=True)
def own_cache_and_no_network(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("HF_FEDMOE_DATA", raising=False)


def write(path, **columns):
    if path.suffix == ".parquet":
        pq.write_table(pa.table(columns), path)
    else:
        data = Dataset.from_dict(columns)
        (data.to_csv if path.suffix == ".csv" else data.to_json)(path)
    return str(path)


def as_pairs(split):
    return set(zip(split["text"], split["label"], strict=True))


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".json", ".jsonl"])
def test_local_file_with_a_held_out_test(tmp_path, suffix):
    texts = [f"text {i}" for i in range(40)]
    name = write(tmp_path / f"data{suffix}", text=texts, label=[0, 1] * 20)
    source = load_source(name, test_size=0.25)
    assert set(source) == {"train", "test"} and len(source["test"]) == 10
    assert source["train"].features["label"] == ClassLabel(names=["0", "1"])
    assert np.bincount(source["test"]["label"][:]).tolist() == [5, 5]
    assert as_pairs(source["train"]) | as_pairs(source["test"]) == set(zip(texts, [0, 1] * 20, strict=True))
    assert as_pairs(load_source(name, test_size=0.25)["test"]) == as_pairs(source["test"])
    assert as_pairs(load_source(name, test_size=0.25, seed=1)["test"]) != as_pairs(source["test"])


def test_string_labels_are_encoded_and_columns_renamed(tmp_path):
    name = write(tmp_path / "d.csv", review=list("abcd") * 5, mood=["sad", "glad", "sad", "mad"] * 5, user=[1, 2] * 10)
    source = load_source(name, text_column="review", label_column="mood", test_size=4)
    assert source["train"].features["label"] == ClassLabel(names=["glad", "mad", "sad"])
    assert as_pairs(source["train"]) == {("a", 2), ("b", 0), ("c", 2), ("d", 1)}
    assert "user" in source["train"].column_names


@pytest.mark.parametrize("stars, expected", [([1, 3, 5], [0, 2, 4]), ([1.0, 3.0, 5.0], [0, 2, 4])])
def test_stars_from_one_are_shifted(tmp_path, stars, expected):
    source = load_source(write(tmp_path / "d.parquet", text=list("abc") * 10, label=stars * 10), test_size=3)
    assert source["train"].features["label"].names == ["1", "2", "3", "4", "5"]
    assert as_pairs(source["train"]) == set(zip("abc", expected, strict=True))


def test_class_labels_stay(tmp_path):
    features = Features({"sentence": Value("string"), "labels": ClassLabel(names=["no", "yes"])})
    data = Dataset.from_dict({"sentence": list("abcdefgh"), "labels": [1, 0] * 4}, features=features)
    data.to_parquet(tmp_path / "d.parquet")
    source = load_source(str(tmp_path / "d.parquet"), test_size=2)
    assert source["train"].features == Features({"text": Value("string"), "label": features["labels"]})
    assert dict(as_pairs(source["train"]) | as_pairs(source["test"]))["a"] == 1


def test_stand_ins_from_the_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_FEDMOE_DATA", str(tmp_path))
    write(tmp_path / "alone.parquet", text=list("abcdefghij"), label=[0, 1] * 5)
    write(tmp_path / "pair_train.parquet", text=["x", "y"], label=["p", "q"])
    write(tmp_path / "pair_test.parquet", text=["z"], label=["r"])
    assert len(load_source("alone")["test"]) == 2
    pair = load_source("pair")
    assert pair["train"].features["label"].names == ["p", "q", "r"]
    assert as_pairs(pair["train"]) == {("x", 0), ("y", 1)} and as_pairs(pair["test"]) == {("z", 2)}


def test_shipped_reviews():
    source = load_source("reviews")
    for split in ("train", "test"):
        assert {"text", "label", "department"} <= set(source[split].column_names)
        assert set(source[split]["label"]) == set(range(5))
    assert not set(source["train"]["text"]) & set(source["test"]["text"])


def test_unknown_name_says_what_was_looked_for(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"No dataset 'nowhere'.*reviews.*HF_FEDMOE_DATA is not set.*on the Hub"):
        load_source("nowhere")
    monkeypatch.setenv("HF_FEDMOE_DATA", str(tmp_path))
    with pytest.raises(ValueError, match=r"nowhere.parquet and .*nowhere_train.parquet"):
        load_source("nowhere")
    with pytest.raises(ValueError, match=r"There is no file 'missing.csv' in the current folder"):
        load_source("missing.csv")


@pytest.mark.parametrize(
    "columns, arguments, message",
    [
        ({"text": ["a"] * 4, "stars": [0, 1] * 2}, {}, "leaves open which column is the label.*label_column="),
        ({"a": ["x"] * 4, "b": ["y"] * 4, "label": [0, 1] * 2}, {}, "leaves open which column is the text"),
        ({"text": ["a"] * 4, "label": [0, 1] * 2}, {"text_column": "body"}, "has no column 'body'"),
        ({"text": ["a"] * 4, "body": ["b"] * 4, "label": [0, 1] * 2}, {"text_column": "body"}, "a column 'text' b"),
        ({"text": ["a", None] * 2, "label": [0, 1] * 2}, {}, "2 rows without text"),
        ({"text": ["a"] * 4, "label": [0, None] * 2}, {}, "2 rows without label"),
        ({"text": ["a"] * 4, "label": [-1, 1] * 2}, {}, "go from -1 to 1, but must start at 0 or 1"),
        ({"text": ["a"] * 4, "label": [0.5, 1] * 2}, {}, "numbers with fractions, for example 0.5"),
        ({"text": ["a"] * 4, "label": [0, 1] * 2}, {"test_size": 0}, "Give a test_size above 0"),
    ],
)
def test_errors(tmp_path, columns, arguments, message):
    name = write(tmp_path / "d.parquet", **columns)
    with pytest.raises(ValueError, match=message):
        load_source(name, **arguments)
