"""The place of each tensor of a module's state in one contiguous row.

Shape suffixes: P elements of one row, S rows of a bank.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from ..models import AdapterExpert


# Every tensor starts on a 64-byte boundary, so that a module bound to a row runs as fast as one that owns its memory.
_ALIGN_BYTES = 64


@dataclass(frozen=True)
class Slot:
    """One tensor of the state: its name, its first element in the row, and its shape."""

    name: str
    start: int
    shape: torch.Size

    @property
    def stop(self) -> int:
        return self.start + self.shape.numel()


@dataclass(frozen=True)
class StateLayout:
    """
    The floating-point state of a module as one row of `size` elements; integer buffers stand beside it. Frozen
    parameters are no part of it: what nobody trains need not travel.

    Args:
        slots (`tuple[Slot]`):
            The trainable parameters and floating-point persistent buffers in `state_dict` order. A tensor shared by
            two names (tied weights) stands once.
        integers (`tuple[str]`):
            Names of the persistent integer buffers. They are taken, never averaged.
        batchnorm (`tuple[tuple[Slot, Slot]]`):
            (running mean, running variance) of every normalisation layer that tracks statistics: variances do not
            average linearly, see [`fuse_`].
        lora (`tuple[tuple[Slot, Slot]]`):
            (A, B) of every LoRA adapter whose product B A is fused; empty where A and B are fused each by itself.
        size (`int`):
            P, the elements of one row, padding included.
        dtype (`torch.dtype`):
            Of the row, and of the module.
    """

    slots: tuple[Slot, ...]
    integers: tuple[str, ...]
    batchnorm: tuple[tuple[Slot, Slot], ...]
    lora: tuple[tuple[Slot, Slot], ...]
    size: int
    dtype: torch.dtype

    @classmethod
    def of(cls, module: nn.Module, lora_products: bool = False) -> "StateLayout":
        """
        The layout of `module`; `lora_products` asks for [`StateLayout.lora`]. Raises `ValueError` when the
        floating-point tensors differ in dtype.
        """
        slots, integers, seen, start = [], [], set(), 0
        dtypes = set()
        for name, tensor in module.state_dict(keep_vars=True).items():
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            if isinstance(tensor, nn.Parameter) and not tensor.requires_grad:
                continue
            if not tensor.is_floating_point():
                integers.append(name)
                continue
            dtypes.add(tensor.dtype)
            slots.append(Slot(name, start, tensor.shape))
            align = _ALIGN_BYTES // tensor.element_size()
            start = -(-slots[-1].stop // align) * align
        if len(dtypes) != 1:
            raise ValueError(
                f"The model's state mixes dtypes, {', '.join(map(str, dtypes))}: load it with one dtype, "
                "`from_pretrained(..., dtype=torch.float32)`, and choose `bf16`/`fp16` in the training arguments."
            )
        by_name = {slot.name: slot for slot in slots}
        batchnorm = tuple(
            (slot, by_name[slot.name.removesuffix("running_mean") + "running_var"])
            for slot in slots
            if slot.name.split(".")[-1] == "running_mean"
        )
        lora = []
        for name in by_name if lora_products else ():
            for part in ("lora_A", "lora_embedding_A"):
                B = name.replace(f".{part}", f".{part[:-1]}B")
                if name != B and B in by_name:
                    lora.append((by_name[name], by_name[B]))
        return cls(tuple(slots), tuple(integers), batchnorm, tuple(lora), start, dtypes.pop())

    @property
    def num_elements(self) -> int:
        """Elements that carry state (without the padding): what travels."""
        return sum(slot.shape.numel() for slot in self.slots)

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Bytes of each tensor of a row."""
        return {slot.name: slot.shape.numel() * self.dtype.itemsize for slot in self.slots}

    @cached_property
    def statistics(self) -> frozenset[str]:
        """Names of the running statistics of normalisation layers."""
        return frozenset(slot.name for pair in self.batchnorm for slot in pair)

    @cached_property
    def _starts(self) -> dict[torch.device, Tensor]:
        return {}

    def _starts_on(self, device: torch.device) -> Tensor:
        """Returns where the tensors of a row begin, copied to a device once."""
        if device not in self._starts:
            starts = [slot.start for slot in self.slots if slot.shape.numel()]
            self._starts[device] = torch.tensor(starts, device=device)
        return self._starts[device]

    def blank_(self, row_P: Tensor) -> None:
        """Empties a row for somebody to write: zeros, and a value that no model has at the start of each tensor."""
        row_P.zero_().index_fill_(0, self._starts_on(row_P.device), torch.finfo(self.dtype).min)

    def blanks(self, row_P: Tensor) -> list[str]:
        """Names of the tensors that nobody has written since [`StateLayout.blank_`]."""
        blank = row_P[self._starts_on(row_P.device)] == torch.finfo(self.dtype).min
        if not blank.any():
            return []
        names = [slot.name for slot in self.slots if slot.shape.numel()]
        return [name for name, left in zip(names, blank.tolist(), strict=True) if left]

    def difference(self, other: "StateLayout") -> str | None:
        """The first difference between two layouts in words, `None` when rows of one fit the other."""
        mine, theirs = ({slot.name: slot for slot in layout.slots} for layout in (self, other))
        for name in mine.keys() | theirs.keys():
            if name not in mine or name not in theirs:
                return f"`{name}` exists, or is trainable, in one of the models only"
            if mine[name].shape != theirs[name].shape:
                return (
                    f"`{name}` is {tuple(mine[name].shape)} in one model and {tuple(theirs[name].shape)} in the other"
                )
        if self.dtype != other.dtype:
            return f"one model is {self.dtype}, the other {other.dtype}"
        return None

    def views(self, row_P: Tensor) -> dict[str, Tensor]:
        """The tensors of a row under their names, sharing its memory."""
        return {slot.name: row_P[slot.start : slot.stop].view(slot.shape) for slot in self.slots}

    @torch.no_grad()
    def read(self, module: nn.Module, out: Tensor | None = None) -> Tensor:
        """Copies the module's state into a row `[P]`: `out`, or a new one."""
        state = module.state_dict(keep_vars=True)
        if out is None:
            out = torch.zeros(self.size, dtype=self.dtype, device=state[self.slots[0].name].device)
        views = self.views(out)
        torch._foreach_copy_(list(views.values()), [state[name] for name in views])
        return out

    @torch.no_grad()
    def write(self, row_P: Tensor, module: nn.Module) -> None:
        """Copies a row `[P]` into the module."""
        state = module.state_dict(keep_vars=True)
        views = self.views(row_P)
        torch._foreach_copy_([state[name] for name in views], list(views.values()))

    @torch.no_grad()
    def bind(self, module: nn.Module, row_P: Tensor) -> None:
        """
        Moves the module's state into the row: afterwards its tensors *are* views of `row_P`, so that fusing rows
        changes the module without a copy (and training the module changes the row).
        """
        state = module.state_dict(keep_vars=True)
        self.read(module, out=row_P)
        for name, view in self.views(row_P).items():
            state[name].data = view

    def read_integers(self, module: nn.Module) -> dict[str, Tensor]:
        """Copies of the module's integer buffers."""
        state = module.state_dict(keep_vars=True)
        return {name: state[name].detach().clone() for name in self.integers}

    @torch.no_grad()
    def write_integers(self, integers: dict[str, Tensor], module: nn.Module) -> None:
        """Copies integer buffers into the module."""
        state = module.state_dict(keep_vars=True)
        for name in self.integers:
            state[name].copy_(integers[name])

    def bank(self, modules: Sequence[nn.Module]) -> Tensor:
        """Binds S modules of this layout to the rows of one new contiguous bank `[S, P]` and returns it."""
        device = next(modules[0].parameters()).device
        bank_SP = torch.zeros(len(modules), self.size, dtype=self.dtype, device=device)
        for row_P, module in zip(bank_SP, modules, strict=True):
            if fault := self.difference(StateLayout.of(module)):
                raise ValueError(f"All experts must have one architecture, but {fault}.")
            self.bind(module, row_P)
        return bank_SP


def in_one_copy(tensors: Mapping[str, Tensor], device: torch.device | str) -> dict[str, Tensor]:
    """
    Moves many tensors to a device in one copy for each dtype: a GPU is waited for by each. Those that are there stay
    as they are, what is moved has memory of its own.
    """
    device, moved = torch.device(device), dict(tensors)
    for kind in {(tensor.dtype, tensor.device) for tensor in tensors.values() if tensor.device != device}:
        own = {name: tensor for name, tensor in tensors.items() if (tensor.dtype, tensor.device) == kind}
        flat = torch.cat([tensor.reshape(-1) for tensor in own.values()]).to(device)
        parts = flat.split([tensor.numel() for tensor in own.values()])
        moved |= {name: part.view(own[name].shape).clone() for name, part in zip(own, parts, strict=True)}
    return moved


def copy_module(module: nn.Module) -> nn.Module:
    """
    A deep copy that owns its memory, also of a module bound to a bank (`deepcopy` would copy the whole bank); that of
    an adapter shares the frozen base.
    """
    if isinstance(module, AdapterExpert):
        return module.copy()
    memo = {}
    for tensor in module.state_dict(keep_vars=True).values():
        clone = tensor.detach().clone()
        memo[id(tensor)] = nn.Parameter(clone, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else clone
    return copy.deepcopy(module, memo)


def release(module: nn.Module) -> None:
    """Undoes [`StateLayout.bind`]: the module's tensors own their memory again."""
    for tensor in module.state_dict(keep_vars=True).values():
        tensor.data = tensor.data.clone()
