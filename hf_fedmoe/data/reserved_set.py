"""The server's reserved set, collated once.

Shape suffixes: R reserved examples.
"""

from collections.abc import Callable, Iterable

import datasets
import torch
from torch import Tensor


class ReservedSet:
    """
    The small labelled set that only the server sees (D^r of Fed-MoE), on the device.

    Args:
        dataset (`datasets.Dataset`): The tokenised reserved examples.
        collate (`Callable`): The data collator: a list of examples to a batch with `labels`.
        batch_size (`int`): Examples of one forward pass in `inputs`.
        device (`torch.device`, *optional*, defaults to CPU): Where batches live.
    """

    def __init__(
        self, dataset: datasets.Dataset, collate: Callable, batch_size: int, device: torch.device | str = "cpu"
    ):
        self._examples = [dataset[index] for index in range(len(dataset))]
        self._collate = collate
        self._device = torch.device(device)
        self.inputs: list[dict[str, Tensor]] = []
        labels = []
        for indices in torch.arange(len(dataset)).split(batch_size):
            batch = self.batch(indices)
            labels.append(batch.pop("labels"))
            self.inputs.append(batch)
        self.labels_R = torch.cat(labels)

    def __len__(self) -> int:
        return len(self._examples)

    def batch(self, indices: Iterable[int]) -> dict[str, Tensor]:
        """The collated examples with these indices, `labels` included."""
        batch = self._collate([self._examples[int(index)] for index in indices])
        return {name: tensor.to(self._device) for name, tensor in batch.items()}
