"""Finds the head of a classifier, which its features end at. Flat: the file travels to the Hub as it is."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def classification_head(classifier: PreTrainedModel) -> str | None:
    """Name of the linear layer that gives the class scores, the last one with `num_labels` outputs, if any has."""
    count = classifier.config.num_labels
    heads = [name for name, m in classifier.named_modules() if isinstance(m, nn.Linear) and m.out_features == count]
    return heads[-1] if heads else None


def last_token(features_BTH: Tensor, input_ids_BT: Tensor | None, pad_token_id: int | None) -> Tensor:
    """Features of the token that Hugging Face decoders classify: the last that is not padding."""
    if input_ids_BT is None or pad_token_id is None:
        return features_BTH[:, -1]
    positions_T = torch.arange(input_ids_BT.shape[1], device=features_BTH.device)
    last_B = (positions_T * (input_ids_BT != pad_token_id).to(features_BTH.device)).argmax(dim=-1)
    return features_BTH[torch.arange(len(last_B), device=features_BTH.device), last_B]
