"""
Example-level differential privacy at a client: DP-SGD by Opacus, in the place of a client's own optimizer steps.

Abadi et al. 2016, "Deep Learning with Differential Privacy", Algorithm 1: examples are drawn by the Poisson scheme,
the gradient of each is shortened, noise is added to their sum, which is divided by the number expected.

Shape suffix: P elements of a model's row.
"""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from ..weights import all_finite, in_one_copy
from .local_updates import LocalUpdates
from .noise import Normals, seeded_normals, system_normals
from .randomness import Stream, fresh_seed, seed_of


class PoissonDraw(NamedTuple):
    """
    The draws of a client's local training.

    Args:
        rate (`float`): Probability with which each example is in the batch of a step.
        steps (`int`): Steps of a round.
        expected (`float`): Examples of a batch, on average.
    """

    rate: float
    steps: int
    expected: float


def poisson_draw(num_examples: int, args: TrainingArguments, epochs: float | None = None) -> PoissonDraw:
    """Returns how a client of so many examples draws them: in as many steps as without privacy."""
    epochs = args.num_train_epochs if epochs is None else epochs
    size = min(args.train_batch_size, num_examples)
    return PoissonDraw(size / num_examples, math.ceil(epochs * math.ceil(num_examples / size)), size)


@dataclass
class ExamplePrivacy:
    """
    Settings of DP-SGD, the same for all clients.

    Args:
        noise_multiplier (`float`): z, the deviation of the noise on a sum in norms of one gradient; 0 only clips.
        clipping_norm (`float`): C, the norm to which the gradient of each example is shortened.
        noise_source (`str`): `"system"`, the operating system's entropy, or `"seed"`, the seed of a client's round.
    """

    noise_multiplier: float
    clipping_norm: float
    noise_source: str

    def steps(self, draw: PoissonDraw, num_examples: int, seed: int) -> list[list[list[int]]]:
        """Draws the batch of each step; a step whose batch is empty has none."""
        # 128 bits of entropy, or what follows from the seed.
        generator = np.random.default_rng(fresh_seed() if self.noise_source == "system" else seed)
        drawn = (np.flatnonzero(generator.random(num_examples) < draw.rate).tolist() for _ in range(draw.steps))
        return [[batch] if batch else [] for batch in drawn]

    def seed_of_masks(self, seed: int) -> int:
        """
        Returns the seed of dropout and augmentation: a fresh one with noise of the system. In a batch each row has
        those of its place, so that whoever knew them could tell a row's absence by the masks of the rows behind it.
        """
        return fresh_seed() >> 65 if self.noise_source == "system" else seed

    def normals(self, seed: int) -> Normals:
        """Returns the noise of a client's round."""
        return system_normals(0) if self.noise_source == "system" else seeded_normals(seed_of(seed, Stream.NOISE))(0)


@dataclass
class PrivateUpdates(LocalUpdates):
    """
    Takes an optimizer's steps by Opacus: its hooks find the gradient of each example in a backward pass of the worker,
    its `DPOptimizer` shortens and adds them. A step follows each pass; one without a pass has an empty batch.

    Noise is added in the hook that `DPOptimizer` has for that moment: its own comes from a generator of PyTorch's,
    which takes no more than 32 bits of a seed on a CPU, so that all noises there are could be tried out.

    Args:
        worker (`nn.Module`): The client's model, whose parameters learn.
        runs (`nn.Module`): What computes it, called with batches by name: itself, or the base under an adapter.
        privacy ([`ExamplePrivacy`]): The settings.
    """

    worker: nn.Module
    runs: nn.Module
    privacy: ExamplePrivacy

    def __post_init__(self) -> None:
        super().__post_init__()
        opacus()
        # It is for layers whose input has no gradient, embeddings among them, and changes nothing.
        warnings.filterwarnings("ignore", "Full backward hook is firing")
        self._rows, self._mu = 0, 0.0
        self._received: dict[str, Tensor] = {}
        # Until a client begins: noise all the same, so that nothing leaves without.
        self._normals = system_normals(0)
        # Before those of Opacus, which keep what layers read.
        self.runs.register_forward_pre_hook(self._count_rows, with_kwargs=True)
        for module in self.runs.modules():
            if isinstance(module, nn.Embedding):
                module.register_forward_pre_hook(self._one_for_each_row)
            elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
                module.register_forward_pre_hook(_in_order_of_rows)
        self._hooks = import_module("opacus.grad_sample").GradSampleHooks(self.runs)
        self._steps = import_module("opacus.optimizers").DPOptimizer(
            self.optimizer, noise_multiplier=0.0, max_grad_norm=1.0, expected_batch_size=1.0
        )
        self._steps.attach_step_hook(self._finish_gradients)

    def begin_client(self, expected: float, seed: int, received: dict[str, Tensor], mu: float) -> None:
        """
        Prepares the steps of a client.

        Args:
            expected (`float`): Examples of a batch, on average.
            seed (`int`): Of the client's round.
            received (`dict[str, Tensor]`): The parameters that it was sent, by name.
            mu (`float`): Weight of the term mu / 2 ||w - w_received||^2 of its loss, which tells of no example.
        """
        self._steps.expected_batch_size = expected
        self._normals, self._received, self._mu = self.privacy.normals(seed), received, mu

    def __call__(self) -> None:
        for parameter, gradients in self.gradients_of_examples().values():
            parameter.grad_sample = gradients  # type: ignore[attr-defined]  # where Opacus has them
        # Without a bound `DPOptimizer` wants a number all the same.
        self._steps.max_grad_norm = min(self.privacy.clipping_norm, torch.finfo(torch.float32).max)
        self._steps.step()
        self.forget()

    def reset(self, kept: dict[str, Tensor] | None) -> None:
        super().reset(kept)
        self.forget()

    def gradients_of_examples(self) -> dict[str, tuple[nn.Parameter, Tensor]]:
        """
        Returns by their names the learning parameters with the gradients of the last pass, `[rows, ...]`: 0 where it
        did not reach them.

        Raises:
            RuntimeError: When Opacus found others than one for each row.
        """
        found = {}
        for name, parameter in self._learning():
            given = parameter.grad_sample  # type: ignore[attr-defined]  # where Opacus has them
            if given is None and parameter.grad is None:
                given = parameter.new_zeros((self._rows, *parameter.shape))
            if not isinstance(given, Tensor) or given.shape != (self._rows, *parameter.shape):
                raise RuntimeError(
                    f"Opacus finds no gradient of each of the {self._rows} rows of a batch in `{name}`, so that none "
                    "can be shortened"
                )
            found[name] = parameter, given
        return found

    def forget(self) -> None:
        """Forgets what Opacus has kept of a pass, also of one that was broken off."""
        self._rows = 0
        self.optimizer.zero_grad()
        for _, parameter in self._learning():
            parameter.grad_sample, parameter.summed_grad, parameter._forward_counter = None, None, 0  # type: ignore[attr-defined]
            vars(parameter).pop("_current_grad_sample", None)
        for module in self.runs.modules():
            vars(module).pop("activations", None)
            vars(module).pop("max_batch_len", None)

    @contextmanager
    def looking_away(self) -> Iterator[None]:
        """Has Opacus look away in a block."""
        self._hooks.disable_hooks()
        try:
            yield
        finally:
            self._hooks.enable_hooks()

    @torch.no_grad()
    def _finish_gradients(self, steps: Any) -> None:
        """Adds noise to the mean gradients, and what the loss has besides examples."""
        z = self.privacy.noise_multiplier
        # No noise hides what is not finite: it would tell of the row, and the server would refuse the upload.
        if z and not all_finite(parameter.grad for _, parameter in self._learning() if parameter.grad is not None):
            self._leave_out_unsound_rows()
            steps.clip_and_accumulate()
            steps.add_noise()
            steps.scale_grad()
        noise = self._noise() if z else {}
        for name, parameter in self._learning():
            assert parameter.grad is not None  # `DPOptimizer` has just set it
            if z:
                parameter.grad.add_(noise[name], alpha=z * self.privacy.clipping_norm / steps.expected_batch_size)
            if self._mu:
                parameter.grad.add_(parameter - self._received[name], alpha=self._mu)

    def _noise(self) -> dict[str, Tensor]:
        """Draws the noise of a step, which is moved in one copy: a GPU is waited for by each."""
        parameters = dict(self._learning())
        drawn = {name: self._normals(parameter.numel()).view_as(parameter) for name, parameter in parameters.items()}
        first = next(iter(parameters.values()))
        return in_one_copy({name: each.to(parameters[name].dtype) for name, each in drawn.items()}, first.device)

    def _leave_out_unsound_rows(self) -> None:
        """Makes the gradients 0 of rows of which one is not finite."""
        each = [(parameter, parameter.grad_sample) for _, parameter in self._learning()]  # type: ignore[attr-defined]
        sound = torch.stack([gradients.flatten(1).isfinite().all(1) for _, gradients in each]).all(0)
        for parameter, gradients in each:
            kept = gradients.clone()  # Opacus takes each tensor once
            kept[~sound] = 0
            parameter.grad_sample, parameter.summed_grad = kept, None  # type: ignore[attr-defined]

    def _learning(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self.worker.named_parameters() if p.requires_grad)

    def _count_rows(self, worker: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._rows = len(next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)))

    def _one_for_each_row(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Expands positions `[1, L]` that are the same for all rows, whose embeddings have a gradient of each then."""
        indices = args[0]
        if isinstance(indices, Tensor) and indices.dim() > 1 and len(indices) == 1 < self._rows:
            return indices.expand(self._rows, *indices.shape[1:]), *args[1:]
        return None


def _in_order_of_rows(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """
    Gives a convolution its maps in the order in which Opacus takes them to be: of channels last, as image
    collators make them, `unfold2d` of version 1.6.0 reads other numbers, and the gradients of examples are wrong.
    """
    return args[0].contiguous(), *args[1:]


def opacus() -> Any:
    """Imports `opacus`; raises `ImportError` that names the extra where it is not installed."""
    try:
        return import_module("opacus")
    except ImportError as error:
        raise ImportError(
            "Example-level privacy is by Opacus, which is missing: `pip install hf_fedmoe[privacy]`."
        ) from error
