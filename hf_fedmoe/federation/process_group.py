"""Processes that train one client together, each on its share of every batch."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import IntEnum

import torch
from torch import Tensor, nn

from .processes import Processes
from .randomness import Stream, seed_of


class Stage(IntEnum):
    """The stages of a client's training."""

    BEGIN = 0
    STEP = 1
    UPLOAD = 2
    END = 3
    FAILED = 4


class LeftAloneError(RuntimeError):
    """Another process could not go on with a client, for the reason that this says."""


@dataclass
class ProcessGroup:
    """
    All processes of a launch while they train one client together; each alone where that is not asked for.

    Every process makes the same steps. Before anything that all must do at once, such as adding up a step's gradients,
    and at the end, each tells the others where it stands: if one failed, whatever it was at, all leave the client
    together and know why, and none waits for another that has gone.

    Args:
        processes ([`Processes`], *optional*): Of the launch; this one alone if left out.
        active (`bool`, *optional*, defaults to `False`): Whether they train a client together now.
    """

    processes: Processes = field(default_factory=Processes)
    active: bool = False

    @contextmanager
    def together(self) -> Iterator[None]:
        """Marks a block in which all processes train the same clients in the same order."""
        self.active = True
        try:
            yield
        finally:
            self.active = False

    def share(self, batch: list[int]) -> tuple[list[int], float]:
        """
        Returns this process's rows of a batch, and how much their mean loss counts. One for which no row is left takes
        one that counts nothing: so all call the model equally often, and none with an empty batch.
        """
        if not self.active:
            return batch, 1.0
        own = batch[self.processes.index :: self.processes.count]
        return own or batch[:1], len(own) / len(batch)

    def seed(self, seed: int) -> int:
        """Gives each process a seed of its own: masks of dropout must not be alike where the rows are not."""
        return seed_of(seed, Stream.PROCESS, self.processes.index) if self.active and self.processes.index else seed

    @contextmanager
    def client(self) -> Iterator[None]:
        """Ends a client's training in all processes or in none, in which case it raises in all."""
        try:
            yield
            self.agree(Stage.END)
        except LeftAloneError:
            raise
        except Exception as error:
            self._tell(Stage.FAILED, f"{type(error).__name__}: {error}")
            raise

    def agree(self, stage: Stage) -> None:
        """Raises [`LeftAloneError`] unless all processes stand there too."""
        if fault := self._tell(stage):
            raise LeftAloneError(fault)

    def _tell(self, stage: Stage, own_fault: str | None = None) -> str | None:
        """Tells all why the client cannot go on, `None` if it can."""
        if not self.active:
            return own_fault
        stages = self.processes.gather_numbers(stage)
        if stages == [stage] * len(stages) and stage != Stage.FAILED:
            return None
        faults = self.processes.gather(lambda: own_fault)
        return next(filter(None, faults), f"processes are at different stages {stages} of its training")

    def all_reduce_gradients_(self, parameters: list[nn.Parameter], loss: Tensor) -> Tensor:
        """
        Makes the gradients the sums of those of all processes, and returns the sum of their losses. A parameter that
        has a gradient in no process keeps none, so that the optimizer leaves it as it is.
        """
        learning = [parameter for parameter in parameters if parameter.requires_grad]
        if not self.active or self.processes.count == 1 or not learning:
            return loss
        dtype = torch.promote_types(learning[0].dtype, torch.float32)
        has_G = torch.tensor([parameter.grad is not None for parameter in learning], dtype=dtype, device=loss.device)
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in learning]
        flat = torch.cat([*(part.reshape(-1).to(dtype) for part in parts), has_G, loss.reshape(1).to(dtype)])
        self.processes.all_reduce_(flat)
        sizes = [parameter.numel() for parameter in learning]
        *sums, has_G, loss_1 = flat.split([*sizes, len(learning), 1])
        for parameter, total, has in zip(learning, sums, has_G.tolist(), strict=True):
            parameter.grad = total.view_as(parameter).to(parameter.dtype) if has else None
        return loss_1[0].to(loss.dtype)
