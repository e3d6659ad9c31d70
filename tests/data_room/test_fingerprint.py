"""Equal contents, equal checksums; another content anywhere, another checksum."""

import datasets
import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, Features, Image, List, Value, concatenate_datasets

from hf_fedmoe.data import rows_fingerprint
from tests.tiny_federation import tiny_rows


COLUMNS = {
    "int": [1, 2, None, 4],
    "float": [0.5, float("nan"), None, -0.0],
    "bool": [True, None, False, True],
    "text": ["one", "", None, "zwölf"],
    "bytes": [b"\x00", b"", None, b"ab"],
    "tokens": [[1, 2], [], None, [3]],
    "nested": [[[1], []], [[2, 3]], None, [[None]]],
    "struct": [{"a": 1, "b": "x"}, {"a": 2, "b": None}, None, {"a": None, "b": "y"}],
}


def rows(**changes):
    return Dataset.from_dict(COLUMNS | changes)


def test_how_a_table_lies_in_memory_does_not_matter():
    many = concatenate_datasets([rows()] * 700)  # more rows than are hashed at once
    whole = rows_fingerprint(many)
    order = np.random.default_rng(0).permutation(len(many))
    back = many.select(order).select(np.argsort(order))
    table = many.with_format("arrow")[:]
    others = {
        "one chunk": Dataset(pa.Table.from_batches(table.combine_chunks().to_batches())),
        "chunks of 33 rows": Dataset(pa.Table.from_batches(table.combine_chunks().to_batches(33))),
        "by indices": back,
        "a slice": concatenate_datasets([many, many]).select(range(len(many), 2 * len(many))),
        "flattened": back.flatten_indices(),
        "columns in another order": many.select_columns(sorted(many.column_names, reverse=True)),
        "read by a transform": many.with_transform(lambda batch: {}),
    }
    assert {name: rows_fingerprint(other) for name, other in others.items()} == dict.fromkeys(others, whole)
    assert len(whole) == 16 and rows_fingerprint(many.select(order)) != whole
    assert rows_fingerprint(many.select(range(len(many) - 1))) != whole


def test_it_is_written_to_disk_and_read_again(tmp_path):
    rows().save_to_disk(tmp_path / "rows")
    assert rows_fingerprint(datasets.load_from_disk(tmp_path / "rows")) == rows_fingerprint(rows())


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("int", [1, 2, 0, 4]),
        ("int", [None, 1, 2, 4]),
        ("float", [0.5, float("nan"), None, 0.0]),
        ("bool", [True, False, None, True]),
        ("text", ["on", "e", None, "zwölf"]),
        ("text", ["one", None, None, "zwölf"]),
        ("bytes", [b"\x00", b"a", None, b"b"]),
        ("tokens", [[1], [2], None, [3]]),
        ("tokens", [[1, 2], None, [], [3]]),
        ("nested", [[[1]], [[2, 3]], None, [[None]]]),
        ("struct", [{"a": 1, "b": "x"}, {"a": 2, "b": None}, {"a": None, "b": None}, {"a": None, "b": "y"}]),
    ],
)
def test_another_content_is_another_checksum(column, values):
    assert values != COLUMNS[column]
    assert rows_fingerprint(rows(**{column: values})) != rows_fingerprint(rows())


def test_only_the_columns_asked_for_count():
    changed = rows(text=["other"] * 4)
    assert rows_fingerprint(changed, ["int", "tokens"]) == rows_fingerprint(rows(), ["tokens", "int"])
    assert rows_fingerprint(changed, ["text"]) != rows_fingerprint(rows(), ["text"])
    assert rows_fingerprint(rows(), []) == rows_fingerprint(rows(), []) != rows_fingerprint(rows().select([0]), [])


def test_one_token_of_one_row():
    plain = tiny_rows(40)
    tokens = [list(row) for row in plain["input_ids"]]
    tokens[17][3] += 1
    changed = plain.remove_columns("input_ids").add_column("input_ids", tokens, feature=plain.features["input_ids"])
    assert rows_fingerprint(changed) != rows_fingerprint(plain)
    assert rows_fingerprint(tiny_rows(40)) == rows_fingerprint(plain)


def test_arrays_of_several_dimensions():
    features = Features({"x": datasets.Array2D((2, 3), "float32"), "y": List(Value("int8"), length=2)})
    values = np.arange(12, dtype=np.float32).reshape(2, 2, 3)
    first, again, other = (
        Dataset.from_dict({"x": x, "y": [[1, 2], [3, 4]]}, features=features) for x in (values, values, values + 1)
    )
    assert rows_fingerprint(first) == rows_fingerprint(again) != rows_fingerprint(other)
    assert rows_fingerprint(first) != rows_fingerprint(first.select([1, 0]))


def test_files_count_by_their_bytes_or_by_name_and_size(tmp_path):
    def images(*stored):
        table = pa.table({"image": pa.array(stored, Image().pa_type)})
        return Dataset(table, info=datasets.DatasetInfo(features=Features({"image": Image()})))

    here, there = tmp_path / "here" / "a.png", tmp_path / "there" / "a.png"
    for path, content in ((here, b"12345"), (there, b"67890")):
        path.parent.mkdir()
        path.write_bytes(content)
    inside = images({"bytes": b"123", "path": "a.png"}, None)
    assert rows_fingerprint(inside) == rows_fingerprint(images({"bytes": b"123", "path": "/moved/b.png"}, None))
    assert rows_fingerprint(inside) != rows_fingerprint(images({"bytes": b"124", "path": "a.png"}, None))
    outside = rows_fingerprint(images({"bytes": None, "path": str(here)}))
    assert outside == rows_fingerprint(images({"bytes": None, "path": str(there)}))
    there.write_bytes(b"123456")
    assert outside != rows_fingerprint(images({"bytes": None, "path": str(there)}))
    assert outside != rows_fingerprint(images({"bytes": None, "path": str(there.with_name("b.png"))}))
