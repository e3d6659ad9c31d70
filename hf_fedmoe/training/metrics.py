"""
Metrics of the server model when the caller names none, and a trial of those that the caller names.

Shape suffixes: B rows of a batch, N rows, C classes.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import EvalPrediction

from ..reporting import scores


# What an evaluation has of any model, and of one of classes.
OF_EVALUATION = ("loss", "runtime", "samples_per_second", "steps_per_second")
OF_CLASSES = ("accuracy", "macro_f1", "auc")


def classification_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """
    `accuracy`, `macro_f1` (mean over all classes of the model, a class that is never right counting 0) and `auc` (mean
    area under the ROC curve of each class among the examples against the rest).

    [`evaluate_metrics`] makes others, those of the Hub.
    """
    logits_BC = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return scores(torch.as_tensor(logits_BC).float().softmax(-1), torch.as_tensor(prediction.label_ids))


def first_logits(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    """Picks the logits, all that is gathered of outputs: those of gate and experts would fill memory for nothing."""
    return logits[0] if isinstance(logits, tuple) else logits


def try_metrics(compute_metrics: Callable[[EvalPrediction], Any], num_labels: int, num_rows: int) -> None:
    """
    Computes metrics of made-up scores, as an evaluation would after the first round.

    Args:
        compute_metrics (`Callable`): The caller's.
        num_labels (`int`): C, of which all are among labels and predictions if there are as many rows.
        num_rows (`int`): N, those of the dataset on which the model will be evaluated.

    Raises:
        ValueError: When that fails, or gives no `dict`.
    """
    row_N = np.arange(num_rows)
    labels_N, wrong_N = row_N % num_labels, row_N // num_labels % 2
    logits_NC = np.eye(num_labels, dtype=np.float32)[(labels_N + wrong_N) % num_labels]
    made_up = f"made-up scores of {num_rows} rows and {num_labels} classes, as many as in the evaluation"
    try:
        found = compute_metrics(EvalPrediction(predictions=logits_NC, label_ids=labels_N))
    except Exception as error:
        said = f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(".")
        raise ValueError(
            f"`compute_metrics` fails on {made_up}, and would after the first round. It says: {said}. Mend it, or "
            "give `evaluate_metrics` settings for so many classes."
        ) from error
    if not isinstance(found, dict):
        raise ValueError(
            f"`compute_metrics` returns {found!r} of {made_up}: return a `dict` of numbers by the names of metrics."
        )
