"""YAML as people write it by hand."""

import math

import pytest

from hf_fedmoe.experiments.yaml_files import read_yaml


def test_scalars_are_those_of_yaml_1_2_and_names_are_texts(tmp_path):
    path = tmp_path / "t.yaml"
    path.write_bytes(
        b"\xef\xbb\xbfa: [1e-3, 1E3, -2., .5, 010, 0x1F, .inf]\r\nb: [no, off, 1:30, 2024-01-01, 1_000]\r\n"
        b"c: [true, ~, '1e-3']\r\n1: {no: 1, 1.0e-3: 2, <<: {late: 3, no: 4}}\r\n"
    )
    given = read_yaml(path)
    assert given["a"] == [0.001, 1000.0, -2.0, 0.5, 10, 31, math.inf]
    assert [type(value) for value in given["a"]] == [float, float, float, float, int, int, float]
    assert given["b"] == ["no", "off", "1:30", "2024-01-01", "1_000"]
    assert given["c"] == [True, None, "1e-3"]
    assert given["1"] == {"no": 1, "1.0e-3": 2, "late": 3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "t.yaml is empty: write `name: value` lines."),
        ("# only a comment\n", "t.yaml is empty: write `name: value` lines."),
        ("- a\n", "t.yaml holds a list: write `name: value` lines."),
        ("seeds: [0\n", "t.yaml, line 2: while parsing a flow sequence of line 1, expected ',' or ']', but got"),
        ("a:\n\tb: 1\n", "t.yaml, line 2: this begins with a tab: indent by spaces."),
        ("a: 1\nb: 2\na: 3\n", "t.yaml, line 3: 'a' stands twice: keep one of them."),
        ("a: {b: 1, b: 2}\n", "t.yaml, line 1: 'b' stands twice: keep one of them."),
        ("a: Fed: MoE\n", "t.yaml, line 1: there is a ': ' too many"),
        ("a: 1\n---\nb: 2\n", "t.yaml, line 2: expected a single document"),
        ("a: !!python/object:os.system {}\n", "t.yaml, line 1: could not determine a constructor"),
        ("? [a]\n: 1\n", "t.yaml, line 1: a name must be one word or number."),
        ("a: \0\n", "t.yaml is no YAML: unacceptable character #x0000"),
    ],
)
def test_what_is_wrong_is_one_line(text, message, tmp_path):
    path = tmp_path / "t.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        read_yaml(path)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_a_path_that_is_no_yaml_file_is_told(tmp_path):
    path = tmp_path / "digits.yaml"
    path.write_bytes("a: 1\nb: ä\n".encode("latin-1"))
    for wrong, message in (
        (path, "digits.yaml, line 2: this is not UTF-8"),
        (tmp_path, "is a folder: name a YAML file."),
        (tmp_path / "digit.yaml", f"There is no file '{tmp_path}/digit.yaml': is it '{path}'?"),
        (tmp_path / "nowhere" / "x.yaml", "x.yaml': check the path."),
        (tmp_path / "gate.yaml", "gate.yaml': check the path."),  # only the ending is alike
        (path / "x.yaml", "cannot be read: Not a directory."),
    ):
        with pytest.raises(ValueError) as error:
            read_yaml(wrong)
        assert message in str(error.value)
