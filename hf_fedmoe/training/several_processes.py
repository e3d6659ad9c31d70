"""Keeps several processes (`accelerate launch`, `torchrun`) alike under [`FederatedTrainer`]."""

from collections.abc import Callable
from functools import cached_property
from typing import Any

from torch import Tensor, nn
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from ..federation import Processes
from .deepspeed_config import hidden_from_accelerate
from .trainer_of_rounds import TrainerOfRounds


class SeveralProcesses(TrainerOfRounds):
    """Rounds are shared out by `federation`; here are the start of a run, and evaluation."""

    def __init__(self, **kwargs: Any):
        with hidden_from_accelerate():
            super().__init__(**kwargs)
        if self.is_fsdp_enabled:
            raise ValueError(
                "The launcher asks for FSDP, which rounds do not honour yet: leave that out of its configuration, "
                "`accelerate launch --multi_gpu ...`, or take DeepSpeed's ZeRO."
            )
        # Many a classifier takes any keyword and ignores `num_items_in_batch`, and `Trainer` would then multiply the
        # loss of evaluation by the number of processes.
        self.model_accepts_loss_kwargs = False
        if self.accelerator.device.type == "cpu":
            # Everything is there already, but Accelerate calls it "cpu:0" among several processes, which is another
            # device to PyTorch: before an evaluation it would copy the model, and part it from the bank.
            self.accelerator.device_placement = False

    @cached_property
    def processes(self) -> Processes:
        """Makes the processes of this launch."""
        args = self.args
        return Processes(args.process_index, args.world_size, self.accelerator.device, args.ddp_timeout)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Says which setting it is if a process waits too long for another, at whatever."""
        with self.processes.waiting():
            return super().train(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Says it of an evaluation too."""
        with self.processes.waiting():
            return super().evaluation_loop(*args, **kwargs)

    def _start_alike(self, identity: Callable[[], dict[str, Any]]) -> None:
        """
        All processes have the same settings and data, which `identity` gives, or `ValueError` is raised, and the main
        one's weights.
        """
        if self.processes.count == 1:
            return
        identities = self.processes.gather(lambda: {"output_dir": self.args.output_dir, **identity()})
        check_alike(identities)
        # A new head is drawn by each process for itself, and not every script sets a seed before.
        self.processes.broadcast_model_(self.model)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Evaluates a batch as [`~transformers.Trainer`] does, but for the loss of the last one."""
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        progress, size = self.accelerator.gradient_state, len(next(iter(inputs.values())))
        if progress.end_of_dataloader:
            # Accelerate fills up the last batch of each process with rows that others have: predictions of those are
            # dropped afterwards, but the batch's mean loss would keep them.
            own = progress.remainder - self.args.process_index * self.args.eval_batch_size
            if 0 < own < size:
                some = {name: tensor[:own] for name, tensor in inputs.items()}
                loss, _, _ = super().prediction_step(model, some, True, ignore_keys)
        return loss, logits, labels


def check_alike(identities: list[dict[str, Any]]) -> None:
    """Raises `ValueError` that names the first setting in which a process differs from the main one."""
    for index, identity in enumerate(identities):
        for name, value in identities[0].items():
            if identity[name] != value:
                raise ValueError(
                    f"The main process has {name} = {value!r}, process {index} has {identity[name]!r}: let the script "
                    "prepare data and settings alike in all processes, from seeds and without clocks."
                )
