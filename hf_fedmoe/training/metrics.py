"""Metrics of the server model when the caller names none."""

import torch
from transformers import EvalPrediction

from ..reporting import scores


def classification_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """
    `accuracy` and `macro_f1` (mean over all classes of the model, a class that is never right counting 0).

    `evaluate.load("accuracy")` would need the Hub; scikit-learn gives the same figures without a network.
    """
    logits_BC = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return scores(torch.as_tensor(logits_BC), torch.as_tensor(prediction.label_ids))
