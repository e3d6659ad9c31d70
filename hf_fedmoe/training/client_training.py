"""Hands the hooks that users of `Trainer` know to the training of clients."""

import copy
from collections.abc import Callable
from typing import Any

import datasets
import torch
from torch import Tensor, nn
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames
from transformers.utils import logging

from ..federation import Federation, Loss, check_start, local_steps, never_accepted, reasons, scale_learning_rates
from ..models.configuration_checks import class_names
from ..strategies import own_loss
from ..weights import release
from .columns import ModelColumns
from .honoured import loss_name
from .readers import Reader, readers_of_run, scan_readers
from .several_processes import SeveralProcesses
from .trial import Trial


logger = logging.get_logger(__name__)


class ClientTraining(ModelColumns, SeveralProcesses):
    """Loss, optimizer and schedule of clients, and the trial of them before the first round."""

    def client_name(self, client: int) -> str:
        """Calls a client in messages, by its name, or by its number from 0."""
        return f"client {self._data.client_name(client)}"

    # The loss

    def _objective(self) -> Loss:
        """Returns the loss of (model, batch) by which clients are trained: the model's own, if it is no other."""
        return own_loss if loss_name(self) is None else self._loss_of_batch

    def _loss_of_batch(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        with self.compute_loss_context_manager():
            # It may take the labels out.
            return self.compute_loss(model, dict(batch))  # type: ignore[return-value]  # no tuple without outputs

    # The optimizer

    @property
    def _optim(self) -> str:
        return OptimizerNames(self.args.optim).value

    def _make_optimizer(self, worker: nn.Module) -> torch.optim.Optimizer:
        """
        Makes an optimizer of a client's model by `create_optimizer`.

        Raises:
            ValueError: When there is none of that name, or it is another model's.
        """
        self._check_that_optimizer_takes("optim_args", worker)
        self._check_that_optimizer_takes("optim_target_modules", worker)
        self.optimizer = None
        begin = f"`optim` is {self._optim!r}, but `create_optimizer(model)` of {type(self).__name__}"
        if self.optimizer_cls_and_kwargs is not None:
            begin = f"`optimizer_cls_and_kwargs` is {self.optimizer_cls_and_kwargs}, but `create_optimizer`"
        try:
            optimizer = self.create_optimizer(worker)
        except Exception as error:
            raise ValueError(
                f"{begin} can make no optimizer. It says: {type(error).__name__}: {error} Install what is missing, or "
                "choose another `optim`, for example 'adamw_torch'."
            ) from error
        if not isinstance(optimizer, torch.optim.Optimizer) or isinstance(optimizer, LayerWiseDummyOptimizer):
            raise ValueError(
                f"{begin} makes a {type(optimizer).__name__}, which clients cannot be trained with: return a "
                "`torch.optim.Optimizer` that takes its steps by itself."
            )
        own = {id(parameter) for parameter in worker.parameters()}
        if not all(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
            raise ValueError(
                f"{begin} makes one of other parameters than those of its argument, a client's model: use `model` "
                "there in the place of `self.model`."
            )
        scale_learning_rates(optimizer, worker, self.strategy.learning_rate_factors(worker))
        return self.accelerator.prepare_optimizer(optimizer, device_placement=False)

    def _check_that_optimizer_takes(self, name: str, worker: nn.Module) -> None:
        """Raises `ValueError` for an argument that makes no difference to the optimizer, which is asked for."""
        value = vars(self.args)[name]
        if not value or self.optimizer_cls_and_kwargs is not None:
            return
        without = copy.copy(self.args)
        setattr(without, name, None)
        try:
            make = self.get_optimizer_cls_and_kwargs
            differs = make(self.args, worker) != make(without, worker)  # type: ignore[arg-type]  # any module will do
        except Exception:  # told when it is made
            return
        if not differs:
            raise ValueError(
                f"`{name}` is {value!r}, of which the optimizer {self._optim!r} takes nothing: leave it "
                "out, or choose the `optim` that it is for."
            )

    # The schedule

    def _local_scheduler(self, optimizer: torch.optim.Optimizer, num_steps: int) -> Any:
        """Makes the learning-rate schedule of one client's local steps in the current round, by `create_scheduler`."""
        args = self.args
        length = num_steps if args.lr_scheduler_scope == "round" else args.rounds
        self.lr_scheduler = None
        scheduler = self.create_scheduler(length, optimizer)
        self.lr_scheduler = None
        if args.lr_scheduler_scope == "run":
            # After the run, what clients train to be evaluated has the rate of the last round.
            round_index = min(self.state.global_step, args.rounds - 1)
            if not isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
                raise ValueError(
                    "`lr_scheduler_scope` is 'run', but a schedule that is no `LambdaLR` has no rate of one round by "
                    'itself: choose "round"'
                )
            factors = [function(round_index) for function in scheduler.lr_lambdas]
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [_always(factor) for factor in factors])
        return scheduler

    def _check_schedule(self) -> None:
        """Raises `ValueError` if clients of the fewest or the most examples can have no schedule."""
        sizes = self._data.client_sizes
        for size in sorted({int(sizes.min()), int(sizes.max())}):
            num_steps = len(local_steps(size, self.args, seed=0))
            optimizer = torch.optim.SGD([torch.zeros(1)], lr=self.args.learning_rate)
            try:
                scheduler = self._local_scheduler(optimizer, num_steps)
                if scheduler.optimizer is not optimizer:
                    raise ValueError("it is that of another optimizer than `create_scheduler` gets")
                optimizer.step()
                scheduler.step()
            except Exception as error:
                kind = SchedulerType(self.args.lr_scheduler_type).value
                raise ValueError(
                    f"`lr_scheduler_type` is {kind!r} and `lr_scheduler_kwargs` "
                    f"{self.args.lr_scheduler_kwargs}, of which there is no schedule for the {num_steps} local steps "
                    f"of a client. It says: {type(error).__name__}: {error}. Give what is missing in "
                    "`lr_scheduler_kwargs`, or choose another schedule, for example 'linear'."
                ) from error

    # The trial

    def _tried_federation(self) -> Federation:
        """Returns what rounds work on, after a look at every row and a trial of what a client does."""
        readers: list[Reader] = []
        self.processes.gather(lambda: readers.extend(self._look_at_rows()))
        federation = self._federation()
        try:
            self.processes.gather(lambda: self._try_out(federation, readers))
        except Exception:
            for module in self.strategy.server_models(self.model):
                release(module)
            raise
        return federation

    def _look_at_rows(self) -> list[Reader]:
        """Looks at all rows of the run; raises `ValueError` that names those that cannot be read."""
        evaluated = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset}
        readers = readers_of_run(
            self._data,
            lambda dataset: self._remove_unused_columns(dataset, "trial"),
            self.train_data_collator,
            self.data_collator,
            {
                f"trainer.eval_dataset[{name!r}]" if name else "trainer.eval_dataset": dataset
                for name, dataset in evaluated.items()
                if isinstance(dataset, datasets.Dataset)
            },
            self.strategy.needs_reserved_set(),
            self.client_name,
        )
        faults = scan_readers(readers, self._num_embeddings(), len(class_names(self.model.config)))
        if faults:
            raise ValueError("\n".join(faults))
        return readers

    def _try_out(self, federation: Federation, readers: list[Reader]) -> None:
        """Tries out what the first round is about to do, see [`Trial`]."""
        check_start(self.strategy, federation.server)
        self._check_schedule()
        Trial(federation, readers, loss_name(self)).run()

    # The end

    def _tell_who_was_never_accepted(self) -> None:
        """Warns of the clients that took part in the rounds of this process and were accepted in none."""
        self.never_accepted = never_accepted(self.rounds)
        if self.never_accepted and self.is_world_process_zero():
            first = self.state.global_step - len(self.rounds) + 1
            logger.warning(
                f"Took part in rounds {first} to {self.state.global_step} and never accepted: "
                f"{reasons(self.never_accepted, self.client_name)}."
            )


def _always(factor: float) -> Callable[[int], float]:
    return lambda step: factor
