"""Warnings of libraries are hidden, ours are notes."""

import warnings

import pytest

from hf_fedmoe.experiments.library_warnings import without_library_warnings


def warn(module, category):
    warnings.warn_explicit("lower it", category, "somewhere.py", 1, module)


def test_a_warning_of_ours_is_a_note_and_that_of_a_library_is_nothing(capsys):
    with without_library_warnings():
        warn("transformers.modeling_utils", FutureWarning)
        warn("peft.peft_model", UserWarning)
        warn("hf_fedmoe.data.splits", UserWarning)
    assert capsys.readouterr() == ("Note: lower it\n", "")


def test_warnings_are_as_before_behind_it():
    with without_library_warnings():
        pass
    with pytest.warns(FutureWarning, match="lower it"):
        warn("transformers.modeling_utils", FutureWarning)
