"""Finds the head of a classifier, which its features end at. Flat: the file travels to the Hub as it is."""

from torch import nn
from transformers import PreTrainedModel


def classification_head(classifier: PreTrainedModel) -> str | None:
    """Name of the linear layer that gives the class scores, the last one with `num_labels` outputs, if any has."""
    count = classifier.config.num_labels
    heads = [name for name, m in classifier.named_modules() if isinstance(m, nn.Linear) and m.out_features == count]
    return heads[-1] if heads else None
