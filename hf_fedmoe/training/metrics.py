"""Metrics of the server model when the caller names none."""

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
