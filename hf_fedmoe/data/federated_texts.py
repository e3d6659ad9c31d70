"""Clients who have text, which a language model is trained on: rows have a label for each token, and no class."""

from collections.abc import Mapping, Sequence

import numpy as np
from datasets import Dataset

from .federated_dataset import FederatedDataset


LABELS = "labels"
TOKENS = "input_ids"


class FederatedTexts(FederatedDataset):
    """
    A [`FederatedDataset`] of rows of tokens, from [`token_rows`]. Rows count as being of one class, of which nothing
    is asked: `label_counts` has the rows of each client.

    Example:

    ```python
    >>> data = FederatedTexts.from_clients({name: token_rows(texts, tokenizer, 128) for name, texts in owners.items()})
    ```
    """

    has_classes = False

    @classmethod
    def from_clients(
        cls,
        clients: Sequence[Dataset] | Mapping[str, Dataset],
        reserved: Dataset | None = None,
        validation: Dataset | None = None,
        test: Dataset | None = None,
        label_column: str = LABELS,
        num_labels: int | None = None,
    ) -> "FederatedDataset":
        """Does what [`FederatedDataset.from_clients`] does; each dataset has `input_ids` and `labels`."""
        return super().from_clients(clients, reserved, validation, test, label_column, num_labels)

    @staticmethod
    def _read_labels(dataset: Dataset, label_column: str, split: str) -> np.ndarray:
        missing = [column for column in (TOKENS, label_column) if column not in dataset.column_names]
        if missing:
            raise ValueError(
                f"{split} has the columns {dataset.column_names}, without {missing}: make rows of tokens, "
                "`token_rows(dataset, tokenizer, sequence_length)`."
            )
        return np.zeros(len(dataset), dtype=np.int64)

    @staticmethod
    def _resolve_classes(
        feature: object, labels: Mapping[str, np.ndarray], num_labels: int | None, label_column: str
    ) -> tuple[int, list[str]]:
        return 1, ["text"]
