"""Training one client where its data is."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import TrainingArguments

from ..strategies import Strategy
from ..weights import Payload, StateLayout


def local_steps(num_examples: int, args: TrainingArguments, seed: int) -> list[list[list[int]]]:
    """
    A client's local training as optimizer steps: each a list of accumulated batches, each a list of indices.

    Every epoch has a new random order that follows from `seed`; accumulation does not reach across epochs and a
    fractional last epoch is rounded up to whole steps, as in `Trainer`.
    """
    generator = torch.Generator().manual_seed(seed)
    steps: list[list[list[int]]] = []
    for _ in range(math.ceil(args.num_train_epochs)):
        batches = [b.tolist() for b in torch.randperm(num_examples, generator=generator).split(args.train_batch_size)]
        if args.dataloader_drop_last and len(batches) > 1 and len(batches[-1]) < args.train_batch_size:
            batches.pop()
        accumulation = args.gradient_accumulation_steps
        steps += [batches[start : start + accumulation] for start in range(0, len(batches), accumulation)]
    steps_per_epoch = len(steps) // math.ceil(args.num_train_epochs)
    return steps[: math.ceil(args.num_train_epochs * steps_per_epoch)]


@dataclass
class LocalTrainer:
    """
    Trains clients one after another in one worker module with one optimizer, reset for each.

    `Trainer.train()` per client would cost a full garbage collection each time, more than many a client's training.

    Args:
        worker (`nn.Module`): The client model, on the device.
        layout ([`StateLayout`]): Of `worker`.
        strategy ([`~strategies.Strategy`]): Gives the loss.
        args ([`~transformers.TrainingArguments`]): Local epochs, batch size, accumulation, clipping.
        collate (`Callable`): The data collator.
        optimizer (`torch.optim.Optimizer`): Over the worker's parameters, prepared by Accelerate.
        make_scheduler (`Callable`): From (optimizer, number of local steps) to a learning-rate scheduler.
        accelerator ([`~accelerate.Accelerator`]): Precision, gradient scaling, device.
    """

    worker: nn.Module
    layout: StateLayout
    strategy: Strategy
    args: TrainingArguments
    collate: Callable
    optimizer: torch.optim.Optimizer
    make_scheduler: Callable
    accelerator: Accelerator

    def __post_init__(self) -> None:
        self._parameters = list(self.worker.parameters())
        # Accelerate's wrapper looks for an optional package on disk in every step; without scaling and ranks it does
        # nothing else.
        if self.accelerator.scaler is None and self.accelerator.distributed_type == DistributedType.NO:
            self.optimizer = self.optimizer.optimizer
        self._learning_rates = [group["lr"] for group in self.optimizer.param_groups]

    def train(
        self,
        dataset: Dataset,
        received_P: Tensor,
        integers: dict[str, Tensor],
        out_P: Tensor,
        seed: int,
        kept_optimizer: dict[str, Tensor] | None = None,
    ) -> Payload:
        """
        One client's local epochs from the received row; its trained row is written to `out_P`.

        Args:
            dataset (`torch.utils.data.Dataset`): The client's examples.
            received_P (`Tensor` of shape `[P]`): What it starts from.
            integers (`dict[str, Tensor]`): Integer buffers to start from.
            out_P (`Tensor` of shape `[P]`): Where the upload goes.
            seed (`int`): Of the data order and of dropout.
            kept_optimizer (`dict[str, Tensor]`, *optional*): Optimizer state of its last round
                ([`LocalTrainer.optimizer_tensors`]); fresh without.
        """
        args, accelerator = self.args, self.accelerator
        torch.manual_seed(seed)
        self.layout.write(received_P, self.worker)
        self.layout.write_integers(integers, self.worker)
        self._reset_optimizer(kept_optimizer)
        received = self.layout.views(received_P)
        steps = local_steps(len(dataset), args, seed)
        scheduler = self.make_scheduler(self.optimizer, len(steps))
        batches = iter(
            DataLoader(
                dataset,
                batch_sampler=[batch for step in steps for batch in step],
                collate_fn=self.collate,
                num_workers=args.dataloader_num_workers,
                pin_memory=args.dataloader_pin_memory and accelerator.device.type == "cuda",
            )
        )
        self.worker.train()
        total = torch.zeros((), device=accelerator.device)
        for step in steps:
            for _ in step:
                batch = next(batches)
                batch = {name: tensor.to(accelerator.device, non_blocking=True) for name, tensor in batch.items()}
                with accelerator.autocast():
                    loss = self.strategy.loss(self.worker, batch, received)
                accelerator.backward(loss / len(step))
                total += loss.detach() / len(step)
            if args.max_grad_norm:
                accelerator.clip_grad_norm_(self._parameters, args.max_grad_norm)
            self.optimizer.step()
            scheduler.step()
            self.optimizer.zero_grad()
        self.layout.read(self.worker, out=out_P)
        metrics = {"loss": (total / len(steps)).item(), "steps": len(steps)}
        return Payload(out_P, self.layout.read_integers(self.worker), len(dataset), metrics)

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """The optimizer's state after [`LocalTrainer.train`] as named tensors, for the client store."""
        return {
            f"optimizer.{index}.{key}": value.detach().clone()
            for index, entries in self.optimizer.state_dict()["state"].items()
            for key, value in entries.items()
            if isinstance(value, Tensor)
        }

    def _reset_optimizer(self, kept: dict[str, Tensor] | None) -> None:
        state = self.optimizer.state_dict()
        state["state"] = {}
        for name, tensor in (kept or {}).items():
            _, index, key = name.split(".")
            state["state"].setdefault(int(index), {})[key] = tensor
        for group, learning_rate in zip(state["param_groups"], self._learning_rates, strict=True):
            group["lr"] = learning_rate
        self.optimizer.load_state_dict(state)
