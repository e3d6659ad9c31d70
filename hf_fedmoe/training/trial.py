"""
One trial before the first round: the client's model is trained for a step on the shortest and the longest row, through
the real collators, precision, optimizer and schedule. What cannot work is refused here, by field, value and remedy.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from ..federation import Federation, StepBatches
from ..strategies import ClientTask, has_own_loss
from ..weights import Payload, all_finite
from .example_gradients import check_example_gradients, check_nothing_is_kept, telling_rows
from .readers import Reader
from .single_rows import check_single_rows
from .trainer_of_rounds import client_model_of


class Trial:
    """
    Tries out what a run is made of. Nothing of the run changes: no weight, no running statistic, no random number.

    Args:
        federation ([`~federation.Federation`]): About to begin.
        readers (`list[Reader]`): Scanned; the first one's rows are the clients'.
        loss_name (`str`, *optional*): What gives the loss, if it is no more the model's own.
    """

    def __init__(self, federation: Federation, readers: list[Reader], loss_name: str | None = None):
        self.local, self.server = federation.local_trainer, federation.server
        self.strategy, self.engine, self.num_clients = federation.strategy, federation.engine, federation.num_clients
        self.readers, self.loss_name = readers, loss_name
        self.device = self.local.accelerator.device
        worker = self.local.worker
        self.model = client_model_of(worker)
        # By their names and shapes, the batches of texts or images that the model has read.
        self._read: list[dict[str, torch.Size]] = []

    def run(self) -> None:
        """Raises `ValueError` for whatever would make every client, or the evaluation of every round, fail."""
        with self._undisturbed():
            guard = register_module_forward_pre_hook(_check_indices)
            try:
                for reader in self.readers:
                    self._try(reader)
                check_single_rows(self.local, self.readers)
            finally:
                guard.remove()
            rows = self.readers[0].extremes()
            subset = torch.utils.data.Subset(self.readers[0].dataset, rows)
            if self.loss_name is not None:
                self._check_that_the_loss_is_asked_for(subset)
            self.engine.try_out(subset)

    # Batches

    def _try(self, reader: Reader) -> None:
        size = self.local.args.train_batch_size if reader.trains else self.local.args.eval_batch_size
        rows = reader.extremes()
        if size == 1 and not self.local.layout.batchnorm:
            rows = rows[-1:]
        batch = self._collate(reader, rows)
        shapes = {name: tensor.shape for name, tensor in batch.items()}
        if any(_covers(read, shapes) for read in self._read):
            return
        try:
            # DeepSpeed shares out what one process may have no room for.
            if reader.trains and not self.local.args.deepspeed:
                if self.local.example_privacy is not None:
                    self._evaluate(batch)
                    self._begin()
                    collate = partial(self._collate, reader)
                    check_example_gradients(self.local, telling_rows(reader), collate, self._loss_is)
                    self._begin()
                    check_nothing_is_kept(self.local, batch, self._loss_is)
                self._train(batch)
            else:
                self._evaluate(batch)
        except _ModelError as error:
            raise ValueError(self._whose_fault(reader, rows, error.__cause__)) from error.__cause__
        self._read.append(shapes)

    def _collate(self, reader: Reader, rows: Sequence[int]) -> dict[str, Tensor]:
        """Returns rows as a batch on the device, or raises `ValueError` if that is none."""
        named = " and ".join(dict.fromkeys(map(reader.name, rows)))
        begin = f"`{reader.collator}` makes of {named}"
        try:
            batch = reader.collate([reader.dataset[row] for row in rows])
        except Exception as error:
            remedy = (
                "Prepare all rows alike, and give the trainer the `processing_class` that they were prepared with."
            )
            wanted, columns = self.model.main_input_name, reader.dataset.column_names
            if wanted not in columns:
                remedy = (
                    f"Of the columns that the model takes they have only {columns}, no {wanted!r}: tokenise texts, or "
                    "decode images, by `data.map(...)`."
                )
            raise ValueError(
                f"`{reader.collator}` can make no batch of {named}. It says: {_line(error)}. {remedy}"
            ) from error
        if not isinstance(batch, Mapping):
            raise ValueError(f"{begin} a {type(batch).__name__}, where the model takes a `dict` of tensors.")
        for name, value in batch.items():
            if not isinstance(value, Tensor):
                raise ValueError(
                    f"{begin} a batch whose {name!r} is a {type(value).__name__}, where the model takes tensors: "
                    f"leave that column out, `data.map(..., remove_columns=[{name!r}])`."
                )
            if value.dim() == 0 or len(value) != len(rows):
                raise ValueError(
                    f"{begin} a batch whose {name!r} has the shape {tuple(value.shape)}, where {len(rows)} rows are "
                    "wanted in the first dimension."
                )
        found = ", ".join(map(repr, batch)) or "nothing"
        if "labels" not in batch:
            raise ValueError(
                f"{begin} a batch of {found} without 'labels', so that there is no loss: collators find them in a "
                "column `label` or `labels`, to which `dataset.rename_column` renames another."
            )
        if self.model.main_input_name not in batch:
            raise ValueError(
                f"{begin} a batch of {found} without {self.model.main_input_name!r}, which a "
                f"{type(self.model).__name__} reads: tokenise texts, or decode images, by `data.map(...)`."
            )
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    # The model

    def _train(self, batch: dict[str, Tensor]) -> None:
        """Takes a client's first step on a batch."""
        local = self.local
        self._begin()
        try:
            local.backward(StepBatches([batch], [1.0]), self._checked_loss(learning=True))
        except (_ModelError, ValueError):
            raise
        except Exception as error:
            raise ValueError(
                f"{self._loss_is} has no gradient that can be computed. It says: {_line(error)}."
            ) from error
        gradients = [parameter.grad for parameter in local.worker.parameters() if parameter.grad is not None]
        if not gradients:
            raise ValueError(
                f"{self._loss_is} depends on no parameter that learns: all gradients are None. Set `requires_grad` of "
                "those that clients are to train."
            )
        if local.accelerator.scaler is None and not all_finite(gradients):
            raise ValueError(
                f"{self._loss_is} has a gradient that is not finite on the shortest or the longest row: no client "
                "could send a sound model."
            )
        try:
            local.apply_gradients()
        except Exception as error:
            raise ValueError(
                f"`optim` is {str(local.args.optim)!r}, whose optimizer clients cannot take a step with. It says: "
                f"{_line(error)}. Choose another, for example 'adamw_torch'."
            ) from error

    def _evaluate(self, batch: dict[str, Tensor]) -> None:
        """Lets the model read a batch without learning from it."""
        self.local.worker.eval()
        with torch.no_grad(), self.local.accelerator.autocast():
            self._checked_loss(learning=False)(self.local.worker, batch)

    def _begin(self) -> None:
        """The worker is a client's, which has just received the server's first model."""
        self.local.begin(self.server.bank_SP[0], self.server.integers[0], num_steps=1)

    @property
    def _loss_is(self) -> str:
        return f"The loss of `{self.loss_name}`" if self.loss_name else f"The loss of the {type(self.model).__name__}"

    def _checked_loss(self, learning: bool) -> Callable[[nn.Module, dict[str, Tensor]], Tensor]:
        own = has_own_loss(self.strategy)
        loss = self.local.objective if own else self.local.loss_near(self.server.bank_SP[0])

        def checked(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
            try:
                value = loss(model, dict(batch))
            except Exception as error:
                raise _ModelError from error
            if not isinstance(value, Tensor):
                raise ValueError(
                    f"{self._loss_is} is {value!r}, where a number is wanted in a tensor: give the trainer a model "
                    "with a head that computes a loss of `labels`, for example an "
                    "`AutoModelForSequenceClassification`."
                )
            if value.numel() != 1:
                raise ValueError(f"{self._loss_is} has the shape {tuple(value.shape)}: return one number, the mean.")
            if not torch.isfinite(value).all():
                raise ValueError(
                    f"{self._loss_is} is {value.item()} on the shortest and the longest row, before any training: "
                    "look at the weights, load them with `dtype=torch.float32`, and at the data."
                )
            if learning and not value.requires_grad:
                raise ValueError(
                    f"{self._loss_is} has no gradient: compute it of the model's outputs, without `detach` or "
                    "`torch.no_grad`."
                )
            return value

        return checked

    # Whose fault it is

    def _whose_fault(self, reader: Reader, rows: Sequence[int], error: BaseException | None) -> str:
        """Says which row the model cannot read, and what it could."""
        said = f"It says: {_line(error)}."
        for row in dict.fromkeys(rows):
            batch = self._collate(reader, [row] * (2 if self.local.layout.batchnorm else 1))
            if self._reads(batch):
                continue
            limit = self._longest_that_it_reads(batch) if reader.length(row) else None
            if limit:
                return self._too_long(reader, row, limit, said)
            shape = tuple(batch[self.model.main_input_name].shape[1:])
            if self.model.main_input_name == "pixel_values":
                return (
                    f"The model cannot read the images, which have the shape {shape} (channels, height, width): build "
                    "it with their `num_channels` and `image_size`, or take an image processor that makes other "
                    f"images. {said}"
                )
            return f"The model cannot read {reader.name(row)}, whose batch has {_shapes(batch)}. {said}"
        named = " and ".join(dict.fromkeys(map(reader.name, rows)))
        return f"{self._loss_is} cannot be computed on {named} in one batch, though the model reads them. {said}"

    def _too_long(self, reader: Reader, row: int, limit: int, said: str) -> str:
        # Of all readers: what is cut is cut for all.
        owners, count = [], 0
        for other in self.readers:
            if other.scan.lengths_N is not None:
                longer = other.rows[other.scan.lengths_N[other.rows] > limit]
                owners += other.owners(longer)
                count += len(longer)
        others = f" So it is with {count} rows, of {_some(owners)}." if count > 1 else ""
        return (
            f"`input_ids` of {reader.name(row)} has {reader.length(row)} tokens, but the model reads no more than "
            f"{limit}: prepare the data with `truncation=True, max_length={limit}`.{others} {said}"
        )

    def _reads(self, batch: dict[str, Tensor]) -> bool:
        self.local.worker.eval()
        try:
            with torch.no_grad(), self.local.accelerator.autocast():
                self.local.worker(**batch)
        except Exception:
            return False
        return True

    def _longest_that_it_reads(self, batch: dict[str, Tensor]) -> int | None:
        """Asks the model, by halves, how much of a text it reads; `None` if it is not the length."""
        length = batch[self.model.main_input_name].shape[1]

        def cut(count: int) -> dict[str, Tensor]:
            return {name: t[:, :count] if t.shape[1:2] == (length,) else t for name, t in batch.items()}

        reads, fails = 0, length
        while fails - reads > 1:
            middle = (reads + fails) // 2
            reads, fails = (middle, fails) if self._reads(cut(middle)) else (reads, middle)
        return reads or None

    # Losses that are not the model's own

    def _check_that_the_loss_is_asked_for(self, rows: torch.utils.data.Subset) -> None:
        """Raises `ValueError` if a client of this method is trained without a call of the loss that the user gave."""
        objective, row_P, integers = self.local.objective, self.server.bank_SP[0], self.server.integers[0]
        self.local.learn_by(_ask)
        self.strategy.setup(self.server, self.num_clients)  # by which tensors go to clients beside models
        try:
            received = Payload(row_P, integers, tensors=self.strategy.download_tensors(self.server, 0))
            task = ClientTask(0, 0, rows, received, torch.zeros_like(row_P), self.local.args.seed)
            self.strategy.train_client(self.local, task)
        except _Asked:
            return
        finally:
            self.local.learn_by(objective)
            self.server.tensors, self.server.cache = {}, {}
        raise ValueError(
            f"`{self.loss_name}` gives the loss, but clients of {self.strategy.name!r} are trained by a loss of that "
            "method, which never asks for it: leave it out, or choose another method."
        )

    # What must be as before

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Restores, after a block, random numbers and the worker: they may be drawn and trained in it."""
        local, scaler = self.local, self.local.accelerator.scaler
        training, scale = local.worker.training, None if scaler is None else scaler.state_dict()
        states = random.getstate(), np.random.get_state()
        devices = [self.device] if self.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager"):
                yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            self._begin()
            local.worker.train(training)
            if scaler is not None:
                scaler.load_state_dict(scale)


class _ModelError(Exception):
    """The model, or its loss, raised the cause of this."""


class _Asked(Exception):  # noqa: N818
    """The method asks for the loss."""


def _ask(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    raise _Asked


def _check_indices(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Raises `IndexError` where a GPU would end the process: an embedding is asked for a row that it has not."""
    # One with a forward of its own, such as BART's of positions, may read only how many there are.
    is_plain = type(module).forward is nn.Embedding.forward
    if isinstance(module, nn.Embedding) and is_plain and inputs and inputs[0].numel():
        largest = int(inputs[0].max())
        if not 0 <= int(inputs[0].min()) <= largest < module.num_embeddings:
            raise IndexError(f"an embedding of {module.num_embeddings} rows is asked for row {largest}")


def _covers(read: dict[str, torch.Size], shapes: dict[str, torch.Size]) -> bool:
    """Tells whether a batch that was read is like another of these shapes, with as many rows and as long texts."""
    return read.keys() == shapes.keys() and all(
        read[name][2:] == shape[2:] and all(a >= b for a, b in zip(read[name][:2], shape[:2], strict=True))
        for name, shape in shapes.items()
    )


def _shapes(batch: dict[str, Tensor]) -> str:
    return ", ".join(f"{name!r} of shape {tuple(tensor.shape)}" for name, tensor in batch.items())


def _some(names: list[str], most: int = 5) -> str:
    names = list(dict.fromkeys(names))
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _line(error: BaseException | None) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(".")
