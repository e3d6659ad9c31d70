import re

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value
from sklearn.datasets import load_digits

from hf_fedmoe.data import hold_out, load_source


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


def test_digits_of_scikit_learn():
    source = load_source("digits", test_size=0.2)
    assert source["train"].features["label"] == ClassLabel(names=list("0123456789"))
    assert isinstance(source["train"].features["image"], Image)
    assert (len(source["train"]), len(source["test"])) == (1438, 359)
    digits = load_digits()
    rows = hold_out(digits.target, 0.2)[0]
    assert source["test"]["label"][:] == digits.target[rows].tolist()
    for image, row in zip(source["test"]["image"][:5], rows[:5], strict=True):
        assert image.mode == "L"
        np.testing.assert_allclose(np.asarray(image), digits.images[row] * 255 / 16, atol=0.51)
    pixels = np.stack([np.asarray(image) for image in source["train"]["image"][:50]])
    assert pixels.dtype == np.uint8 and pixels.min() == 0 and pixels.max() == 255
    assert load_source("digits", seed=1)["test"]["label"][:] != source["test"]["label"][:]


def write_images(path, column="img", label="label", **columns):
    pixels = [np.full((4, 4, 3), 10 * i, dtype=np.uint8) for i in range(8)]
    features = {column: Image(), label: Value("int64"), **dict.fromkeys(columns, Value("string"))}
    data = Dataset.from_dict({column: pixels, label: [0, 1] * 4, **columns}, features=Features(features))
    data.to_parquet(path)
    return str(path)


def grey_of(split):
    return dict(zip((np.asarray(image)[0, 0, 0].item() for image in split["image"]), split["label"], strict=True))


@pytest.mark.parametrize("label", ["label", "labels", "fine_label"])
@pytest.mark.parametrize("column, arguments", [("image", {}), ("img", {}), ("img", {"image_column": "img"})])
def test_images_are_found_under_any_name(tmp_path, column, arguments, label):
    name = write_images(tmp_path / "d.parquet", column, label, coarse_label=list("pqrs") * 2)
    source = load_source(name, test_size=2, **arguments)
    assert source["train"].column_names == source["test"].column_names
    assert set(source["train"].column_names) == {"image", "label", "coarse_label"}
    assert grey_of(source["train"]) | grey_of(source["test"]) == {10 * i: i % 2 for i in range(8)}


def test_images_in_train_and_test_files_of_the_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_FEDMOE_DATA", str(tmp_path))
    for split in ("train", "test"):
        write_images(tmp_path / f"pictures_{split}.parquet")
    source = load_source("pictures")
    assert grey_of(source["train"]) == grey_of(source["test"]) == {10 * i: i % 2 for i in range(8)}


def test_images_win_unless_text_column_is_given(tmp_path):
    name = write_images(tmp_path / "d.parquet", text=list("abcdefgh"))
    assert set(load_source(name, test_size=2)["train"].column_names) == {"image", "label", "text"}
    texts = load_source(name, text_column="text", test_size=2)["train"]
    assert set(texts.column_names) == {"img", "label", "text"}
    with pytest.raises(ValueError, match="text_column is 'text' and image_column is 'img', but a classifier reads"):
        load_source(name, text_column="text", image_column="img")


def test_image_column_errors(tmp_path):
    name = write_images(tmp_path / "d.parquet", caption=list("abcdefgh"))
    with pytest.raises(ValueError, match=r"has no column 'photo'.*Give image_column="):
        load_source(name, image_column="photo")
    with pytest.raises(ValueError, match=r"has no images in 'caption' but Value.'string'.*Give another image"):
        load_source(name, image_column="caption")
    two = Dataset.from_dict({"left": [None], "right": [None], "label": [0]}).cast_column("left", Image())
    two.cast_column("right", Image()).to_parquet(tmp_path / "two.parquet")
    with pytest.raises(ValueError, match=r"leaves open which column is the image.*'right'.*Give image_column="):
        load_source(str(tmp_path / "two.parquet"))


def test_missing_images_are_an_error_whose_remedy_works(tmp_path):
    data = Dataset.from_parquet(write_images(tmp_path / "d.parquet"))
    images = data.cast_column("img", Image(decode=False))["img"][:]
    images[1], images[5] = None, {"bytes": None, "path": None}
    # Written without `datasets`, which would refuse an image of neither bytes nor path.
    table = data.data.table.set_column(0, "img", pa.array(images, type=Image().pa_type))
    pq.write_table(table.replace_schema_metadata(data.data.schema.metadata), tmp_path / "d.parquet")
    with pytest.raises(
        ValueError, match=r"2 rows without image .column 'img'.*Remove them: (?:.*) and cast it"
    ) as error:
        load_source(str(tmp_path / "d.parquet"), test_size=2)
    remedy = re.search(r"Remove them: (.*), and cast it back", str(error.value)).group(1)
    dataset = Dataset.from_parquet(str(tmp_path / "d.parquet"))
    # Run as a user would who copies it.
    cleaned = eval(remedy, {"dataset": dataset, "datasets": datasets}).cast_column("img", Image())
    cleaned.to_parquet(tmp_path / "clean.parquet")
    source = load_source(str(tmp_path / "clean.parquet"), test_size=2)
    assert grey_of(source["train"]) | grey_of(source["test"]) == {10 * i: i % 2 for i in (0, 2, 3, 4, 6, 7)}


def test_unknown_name_says_what_was_looked_for(tmp_path, monkeypatch):
    with pytest.raises(
        ValueError, match=r"No dataset 'nowhere'.*reviews.*digits.*HF_FEDMOE_DATA is not set.*on the Hub"
    ):
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


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.csv", "text,label\ncaf\xe9,a\n".encode("latin-1"), r"d.csv' is not UTF-8 \(.*Save the file as UTF-8"),
        ("d.csv", b"", "d.csv' has no rows"),
        ("d.csv", b"text,label\n", "d.csv' has no rows"),
        (
            "d.jsonl",
            b'{"text": "a", "label": 0}\n{"text": "b", "la',
            "d.jsonl' cannot be read as json. It says: Arrow",
        ),
        ("d.parquet", b"hello", "d.parquet' cannot be read as parquet. It says: ArrowInvalid"),
        (
            "d.csv",
            b"text,label\na,b\n",
            "test_size is 0.2, which holds out none of its 1 rows. Give a larger test_size",
        ),
        ("d.csv", b"text;label|x\na;b\n", r"one column, 'text;label\|x', whose name holds ';' and '\|'\. Separate"),
        ("d.csv", b"text;label;text\nfine;a;dull\n", "d.csv' has 2 columns 'text': give each a name of its own"),
        ("d.csv", b"text,label\nfine, but late,a\ndull, and long,b\n", "more values in each row than .*'text,label'"),
        ("d.csv", b"text,label,text\nfine,a,dull\n", "d.csv' has 2 columns 'text': give each a name of its own"),
        ("d.csv", b"text,label\nfine,a,\ndull,b,\n", "d.csv' has more values in each row than names in its first"),
        ("d.csv", b"text,label\n1,a\n2,b\n", r"has no texts in 'text' but Value\('int64'\)"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_source(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_a_csv_may_have_semicolons_or_tabs(tmp_path):
    for sign in ";\t":
        lines = [f"text{sign}label", *(f"fine, {row}{sign}{'ab'[row % 2]}" for row in range(10))]
        (tmp_path / "d.csv").write_text("\n".join(lines) + "\n")
        source = load_source(str(tmp_path / "d.csv"))
        assert sorted(source["train"]["text"][:] + source["test"]["text"][:])[1] == "fine, 1"
        assert source["train"].features["label"].names == ["a", "b"] and source["test"].num_rows == 2


def test_a_csv_may_have_a_column_that_is_called_as_an_index(tmp_path):
    write(tmp_path / "d.csv", text=["x", "y"] * 5, label=["a", "b"] * 5, __index_level_0__=list(range(10)))
    assert sorted(load_source(str(tmp_path / "d.csv"))["train"]["__index_level_0__"])[-1] == 9


def test_a_name_is_no_pattern(tmp_path):
    for name in ("data [1]*.csv", "data 1 other.csv"):
        write(tmp_path / name, text=[name] * 10, label=["a", "b"] * 5)
    source = load_source(str(tmp_path / "data [1]*.csv"))
    assert set(source["train"]["text"][:]) == {"data [1]*.csv"}
