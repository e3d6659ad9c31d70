"""The server's reserved set, collated once, when it is first used.

Shape suffixes: R reserved examples.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property

import datasets
import torch
from torch import Tensor, nn


class ReservedSet:
    """
    The small labelled set that only the server sees (D^r of Fed-MoE), on the device.

    Args:
        dataset (`datasets.Dataset`): The tokenised reserved examples.
        collate (`Callable`): The data collator: a list of examples to a batch with `labels`.
        batch_size (`int`): Examples of one forward pass in `inputs`.
        device (`torch.device`, *optional*, defaults to CPU): Where batches live.
        train_collate (`Callable`, *optional*): The collator of batches to train on, as it may augment; `collate` if
            left out.
        autocast (`Callable`, *optional*): Gives the context in which the server runs models on these examples, for
            half precision.
        objective (`Callable`, *optional*): The loss of (model, batch) by which models are trained on these examples;
            their cross-entropy if left out.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        collate: Callable,
        batch_size: int,
        device: torch.device | str = "cpu",
        train_collate: Callable | None = None,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
        objective: Callable[[nn.Module, dict[str, Tensor]], Tensor] | None = None,
    ):
        self._examples = [dataset[index] for index in range(len(dataset))]
        self._collate = collate
        self._train_collate = train_collate or collate
        self._device = torch.device(device)
        self.autocast, self.objective = autocast, objective
        self._batch_size = batch_size

    def __len__(self) -> int:
        return len(self._examples)

    @cached_property
    def _batches(self) -> tuple[list[dict[str, Tensor]], Tensor]:
        # When they are asked for: by then a run has tried its collators out, and said in plain words what is wrong.
        batches = [self.batch(indices) for indices in torch.arange(len(self)).split(self._batch_size)]
        labels_R = torch.cat([batch.pop("labels") for batch in batches])
        return batches, labels_R

    @property
    def inputs(self) -> list[dict[str, Tensor]]:
        """All examples in batches, without their labels."""
        return self._batches[0]

    @property
    def labels_R(self) -> Tensor:
        """Their labels."""
        return self._batches[1]

    def batch(self, indices: Iterable[int]) -> dict[str, Tensor]:
        """The collated examples with these indices, `labels` included."""
        return self._collated(indices, self._collate)

    def training_batch(self, indices: Iterable[int]) -> dict[str, Tensor]:
        """Returns the examples as an expert trains on them: augmented, if clients augment."""
        return self._collated(indices, self._train_collate)

    def _collated(self, indices: Iterable[int], collate: Callable) -> dict[str, Tensor]:
        # Indices on a GPU are waited for, so all at once; what goes there need not be.
        places = indices.tolist() if isinstance(indices, Tensor) else map(int, indices)
        batch = collate([self._examples[place] for place in places])
        return {name: tensor.to(self._device, non_blocking=True) for name, tensor in batch.items()}
