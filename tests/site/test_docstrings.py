"""Docstrings in Hugging Face's form as reStructuredText."""

import runpy
from pathlib import Path

import pytest


SITE = Path(__file__).parents[2] / "docs" / "site"
CONVERTER = runpy.run_path(str(SITE / "hugging_face_docstrings.py"))

DOCSTRING = """
Trains `model` as [`~transformers.Trainer`] does; see
[`Server.bank`] for W_Km*.

- one
- two

Args:
    model ([`~data.FederatedDataset`] or `PeftModel`):
        The model: as it is,
        with `a: b`.
    rate, mu (`float`, *optional*, defaults to 0.3): Weights.

Raises:
    `ValueError`: When wrong.

Returns:
    `torch.Tensor` of shape `(K,)`: sums to 1.

Example:

```python
>>> 1 + 1
2
```
""".strip()

CONVERTED = r"""
Trains ``model`` as ``Trainer`` does; see :py:obj:`Server.bank <hf_fedmoe.Server.bank>` for W_Km\*.

- one

- two

.. rubric:: Arguments

``model`` (:py:obj:`FederatedDataset <hf_fedmoe.FederatedDataset>` or ``PeftModel``)
   The model: as it is, with ``a: b``.

``rate, mu`` (``float``, *optional*, defaults to 0.3)
   Weights.

.. rubric:: Raises

``ValueError``
   When wrong.

.. rubric:: Returns

``torch.Tensor`` of shape ``(K,)``: sums to 1.

.. rubric:: Example

.. code-block:: python

   >>> 1 + 1
   2
""".strip()


def test_a_docstring_is_converted():
    assert "\n".join(CONVERTER["convert"](DOCSTRING)).strip() == CONVERTED


@pytest.mark.parametrize(
    ("markdown", "converted"),
    [
        ("`a`s and `b`", "``a``\\ s and ``b``"),
        ("sums of [`ServerStep`]s", "sums of :py:obj:`ServerStep <hf_fedmoe.ServerStep>`\\ s"),
        ("fuse_ and a_b, |x|", "fuse\\_ and a_b, \\|x\\|"),
        ("a\n   line **again**", "a line **again**"),
    ],
)
def test_marks_are_converted(markdown, converted):
    assert CONVERTER["inline"](markdown) == converted


def test_a_name_of_another_library_is_code():
    assert CONVERTER["link"]("~transformers.Trainer") == "``Trainer``"
    assert CONVERTER["link"]("ClientDifferences") == "``ClientDifferences``"
