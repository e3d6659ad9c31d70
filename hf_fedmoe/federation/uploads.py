"""
The forms in which the server has the models of a round: all rows, those of each process where they are, or their sum.

Each form has two sides. The round puts uploads in: [`Rows.row`] says where a client's model goes, [`Rows.add`] is told
when it is there and sound, [`Rows.bring`] moves it to the main process if it has to. [`Rows.close`] makes [`Uploads`]
of them, which is what a method sees.

Shape suffixes: m participants, n of them in this process, P elements of a model's row, S rows of the server.
"""

from typing import Any

import torch
from torch import Tensor

from ..weights import add_to_sum_, fuse_, mean_of_sum_
from .contract import Server, Uploads
from .processes import Processes, unbroken


class NotKeptError(AttributeError):
    """A method asks for more of the uploads than it says that it `needs`."""


class FusibleUploads(Uploads):
    """[`Uploads`] for a method that `needs` "fusion": it does not see the rows."""

    @property
    def rows_mP(self) -> Tensor:
        raise NotKeptError('`uploads.rows_mP` is there for methods that say `needs = "rows"`')


class AverageableUploads(FusibleUploads):
    """[`Uploads`] for a method that `needs` their "mean"."""

    @property
    def tensors(self) -> list[dict[str, Tensor]]:
        raise NotKeptError('`uploads.tensors` is there for methods that say `needs = "fusion"` or "rows"')

    def fuse_into_(self, server: Server, weights_Sm: Tensor, keep_S: Tensor) -> Tensor:
        raise NotKeptError('`uploads.fuse_into_` is there for methods that say `needs = "fusion"`')


class ShardedUploads(FusibleUploads):
    """
    [`FusibleUploads`] of which each process has those that it trained.

    Args:
        own_nP (`Tensor` of shape `[n, P]`): Those of this process.
        places (`list[int]`): Their places among all.
        processes ([`Processes`]): Of the launch.
    """

    def __init__(self, *args: Any, own_nP: Tensor, places: list[int], processes: Processes):
        super().__init__(*args)
        self.own_nP, self.places, self.processes = own_nP, places, processes

    def fuse_into_(self, server: Server, weights_Sm: Tensor, keep_S: Tensor) -> Tensor:
        """Called in the main process while it takes the server's step; the others help."""
        if self.processes.count > 1:
            self.processes.tell((fuse_own_, (weights_Sm.cpu(), keep_S.cpu())))
        self.fuse_own_(server, weights_Sm, keep_S)
        return torch.zeros(len(server.bank_SP))

    def fuse_own_(self, server: Server, weights_Sm: Tensor, keep_S: Tensor) -> None:
        """Fuses those of this process; the main one's bank takes the sums, some columns at a time."""
        device = self.own_nP.device
        weights_Sn, keep_S = weights_Sm[:, self.places].to(device), keep_S.to(device)
        with unbroken("Fusion"):
            fuse_(server.bank_SP, self.own_nP, weights_Sn, keep_S, server.layout.batchnorm, self.processes.reduce_)


def fuse_own_(step: Any, weights_Sm: Tensor, keep_S: Tensor) -> None:
    """Does this process's part of [`ShardedUploads.fuse_into_`] in a [`SharedStep`]."""
    step.uploads.fuse_own_(step.server, weights_Sm, keep_S)


class MeanOfUploads(AverageableUploads):
    """
    [`AverageableUploads`] of which nobody has the rows: in the main process `mean_1P` is their mean, `sums` are those
    of the tensors beside them.
    """

    def __init__(self, *args: Any, mean_1P: Tensor, sums: dict[str, Tensor]):
        super().__init__(*args)
        self.mean_1P, self.sums = mean_1P, sums

    def sum_of(self, name: str) -> Tensor:
        return self.sums[name]

    def _summands(self) -> tuple[Tensor, Tensor]:
        return self.mean_1P, self.num_examples_m.sum()[None]


KINDS: dict[str, type[Uploads]] = {"rows": Uploads, "fusion": FusibleUploads, "mean": AverageableUploads}


class UploadMemory:
    """Rows for uploads, kept from round to round: fresh pages of memory take time."""

    def __init__(self, server: Server):
        self.server, self._rows_mP = server, server.bank_SP[:0]

    def rows(self, count: int) -> Tensor:
        """Returns `[count, P]`; the memory of the last call."""
        if len(self._rows_mP) < count:
            bank_SP = self.server.bank_SP
            self._rows_mP = torch.zeros(count, bank_SP.shape[1], dtype=bank_SP.dtype, device=bank_SP.device)
        return self._rows_mP[:count]


class Rows:
    """
    Collects all uploads of a round as rows of the main process.

    Args:
        server ([`Server`]): Whose uploads they are.
        memory ([`UploadMemory`]): Of the rows.
        processes ([`Processes`]): Of the launch.
        owners (`list[int]`): The process that trains each participant.
        groups (`list[list[int]]`): The places of the participants that this one trains, those together that it trains
            at once.
        needs (`str`): What the method says of itself, [`Strategy.needs`].
        beside (`list[dict[str, Tensor]]`): Likes of what each participant sends beside its model,
            [`Strategy.upload_tensors`].
    """

    main_takes_all = True

    def __init__(
        self,
        server: Server,
        memory: UploadMemory,
        processes: Processes,
        owners: list[int],
        groups: list[list[int]],
        needs: str,
        beside: list[dict[str, Tensor]],
    ):
        self.server, self.processes, self.owners, self.needs = server, processes, owners, needs
        self.beside, self.tensors = beside, dict[int, dict[str, Tensor]]()
        self.rows = self.allocate(memory, groups)
        self.spare_P: Tensor | None = None

    def allocate(self, memory: UploadMemory, groups: list[list[int]]) -> dict[int, Tensor]:
        """Returns a row for each participant that this process trains; the main one may have a row for all."""
        takes_all = self.main_takes_all and self.processes.index == 0
        self.local = [place for place, owner in enumerate(self.owners) if takes_all or owner == self.processes.index]
        self.rows_nP = memory.rows(len(self.local))
        return dict(zip(self.local, self.rows_nP, strict=True))

    def row(self, place: int) -> Tensor:
        """Returns the row, blank, to which the upload of a participant goes in this process."""
        row_P = self.rows.get(place)
        if row_P is None:  # of processes that train a client together only the main one keeps its row
            if self.spare_P is None:
                self.spare_P = torch.zeros_like(self.server.bank_SP[0])
            row_P = self.spare_P
        self.server.layout.blank_(row_P)
        return row_P

    def add(self, place: int, num_examples: int, tensors: dict[str, Tensor]) -> None:
        """Takes note of a sound upload where it was trained, and copies of the tensors beside it."""
        self.tensors[place] = {name: tensor.clone() for name, tensor in tensors.items()}

    def bring(self, place: int) -> None:
        """Moves a sound upload to where it is needed; all processes call it."""
        if place in self.rows:
            self.processes.move_(self.rows[place], self.owners[place], 0)
        self._bring_tensors(place)

    def _bring_tensors(self, place: int) -> None:
        if self.processes.index == 0 and place not in self.tensors:
            device = self.server.bank_SP.device
            likes = self.beside[place].items()
            self.tensors[place] = {name: torch.empty_like(like, device=device) for name, like in likes}
        for name in self.beside[place] if place in self.tensors else ():
            self.processes.move_(self.tensors[place][name], self.owners[place], 0)

    def close(self, places: list[int], *known: Any) -> Uploads:
        """
        Returns what the method sees.

        Args:
            places (`list[int]`): The sound ones.
            known: `clients`, `integers`, `num_examples_m`, `metrics` and `probed` of [`Uploads`].
        """
        clients, *others = known
        known = (clients, self._sound(places), *others, self._beside(places))
        return KINDS[self.needs](*known)

    def _beside(self, places: list[int]) -> list[dict[str, Tensor]]:
        """Returns the tensors that sound uploads have beside their models, as far as they are here."""
        return [self.tensors.get(place, {}) for place in places]

    def _sound(self, places: list[int]) -> Tensor:
        """The rows of this process that are sound."""
        if len(places) == len(self.owners):
            return self.rows_nP
        return self.rows_nP[[place in places for place in self.local]]


class ShardedRows(Rows):
    """Leaves each upload in the process that trained it, for a method that `needs` "fusion"."""

    main_takes_all = False

    def bring(self, place: int) -> None:
        """Leaves its row where it is."""
        self._bring_tensors(place)

    def close(self, places: list[int], *known: Any) -> Uploads:
        clients, *others = known
        own = [places.index(place) for place in self.local if place in places]
        known = (clients, None, *others, self._beside(places))
        return ShardedUploads(*known, own_nP=self._sound(places), places=own, processes=self.processes)


class Sum(Rows):
    """Adds uploads up as they come, for a method that `needs` their "mean": however many, they take a row or two."""

    def allocate(self, memory: UploadMemory, groups: list[list[int]]) -> dict[int, Tensor]:
        # One row for each client of a group that is trained at once, again and again.
        rows_nP = memory.rows(max(map(len, groups), default=1))
        self.sum_P = torch.zeros(self.server.layout.size, device=rows_nP.device)
        likes = {name: like for tensors in self.beside for name, like in tensors.items()}
        self.sums = {name: torch.zeros_like(like, device=rows_nP.device) for name, like in likes.items()}
        self.mean_1P = rows_nP[:1]
        return {place: rows_nP[index] for group in groups for index, place in enumerate(group)}

    def add(self, place: int, num_examples: int, tensors: dict[str, Tensor]) -> None:
        add_to_sum_(self.sum_P, self.rows[place], num_examples, self.server.layout.batchnorm)
        for name, tensor in tensors.items():
            self.sums[name] += tensor

    def bring(self, place: int) -> None:
        """Leaves it where it is."""

    def close(self, places: list[int], *known: Any) -> Uploads:
        clients, integers, num_examples_m, *others = known
        for total in (self.sum_P, *self.sums.values()):
            self.processes.reduce_(total)
        mean_of_sum_(self.sum_P, int(num_examples_m.double().sum().item()), self.server.layout.batchnorm)
        self.mean_1P.copy_(self.sum_P)
        known = (clients, None, integers, num_examples_m, *others)
        return MeanOfUploads(*known, mean_1P=self.mean_1P, sums=self.sums)


# How uploads are collected where they stay in the processes that trained them, by what the method needs.
SHARDED: dict[str, type[Rows]] = {"fusion": ShardedRows, "mean": Sum}
