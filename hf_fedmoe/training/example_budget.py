"""The accounting of example-level privacy: the noise of clients, what their rounds have spent, and when to stop."""

import math
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from ..federation import ExamplePrivacy, Federation, RoundReport, Server, poisson_draw, read_json, write_json
from ..reporting import ExamplePrivacyFacts, PrivacyFacts
from .federated_arguments import FederatedTrainingArguments
from .privacy_budget import LEAST_NOISE, PLD_INTERVAL, NoBudget, PrivacyBudget, dp_accounting


logger = logging.get_logger(__name__)

# In `server.tensors`, and so in checkpoints: the noise multiplier, and the rounds in which each client was drawn.
SPENT = "example_privacy.spent"
# In `output_dir`: the same, written before each round. The underscore keeps it from the Hub.
SPENT_FILE = "_example_privacy_spent.json"
# Losses in which clients report what no noise hides; they do not send them, and none is logged.
NOT_TOLD = ("loss", "train_loss")


class ExampleBudget(NoBudget):
    """
    The accounting of a run whose clients train by DP-SGD. A client that was drawn in k rounds has taken k times the
    steps of one, each on a batch that has every example with the same probability.

    Args:
        args ([`FederatedTrainingArguments`]): Of the run.
        client_sizes (`Sequence[int]`): Examples of each client.
    """

    def __init__(self, args: FederatedTrainingArguments, client_sizes: Sequence[int]):
        self.args, self.client_sizes = args, list(client_sizes)
        self.noise_multiplier = args.example_noise_multiplier or 0.0
        self.server: Server | None = None
        # Noise, batch size and local epochs of the rounds so far.
        self._trained: tuple[float, ...] = ()
        self._epsilon_once, self._find_once = cache(self._epsilon), cache(self._find_noise)
        if args.example_noise_multiplier != 0:
            dp_accounting()  # here, not after hours of training

    def example_privacy(self) -> ExamplePrivacy:
        """Returns the settings by which clients train; the noise is found, if it is not given."""
        z, norm = self.args.example_noise_multiplier, self.args.example_clipping_norm
        target, once = self.args.example_target_epsilon, [1] * len(self.client_sizes)
        assert norm is not None  # the arguments are checked
        if z and target is not None and self.epsilon(once) > target:
            raise ValueError(
                f"`example_target_epsilon` is {target:g}, but with `example_noise_multiplier` {z:g} the first round "
                f"costs a client {self.epsilon(once):.4g}: raise one of them, or leave the noise out, which is found "
                "then."
            )
        return ExamplePrivacy(self.find_noise() if z is None else z, norm, self.args.noise_source)

    def begin(self, federation: Federation, output_dir: Path, resumed: Path | None) -> None:
        """
        Takes the noise and the rounds of each client from a checkpoint, if there is one. A round that was broken off,
        of which no checkpoint knows, counts too.
        """
        privacy = federation.local_trainer.example_privacy
        assert privacy is not None  # made by `example_privacy`
        trained = privacy.noise_multiplier, self.args.train_batch_size, self.args.num_train_epochs
        if any(self.rounds) and resumed is None and trained != self._trained:
            raise ValueError(
                "This trainer has trained with (noise multiplier, batch size, local epochs) "
                f"{self._trained} and would with {trained}, but `example_epsilon` counts all rounds alike: leave "
                "`example_noise_multiplier`, `per_device_train_batch_size` and `num_train_epochs`, and `rounds` where "
                "noise is found for them, as they were, or make a new trainer, whose epsilon adds to this one's."
            )
        rounds = self.rounds  # a trainer that trains once more goes on with what it has spent
        if resumed is not None:
            privacy.noise_multiplier, *noted = federation.server.tensors[SPENT].tolist()
            known = federation.processes.on_main(lambda: read_json(resumed.parent / SPENT_FILE))
            rounds = [int(count) for count in noted]
            if known is not None:
                rounds = [max(pair) for pair in zip(rounds, known["rounds"], strict=True)]
        self.server, self.noise_multiplier = federation.server, privacy.noise_multiplier
        self._trained = privacy.noise_multiplier, *trained[1:]
        self._note(rounds)

        def on_draw(chosen: list[int]) -> None:
            self._note([count + (client in chosen) for client, count in enumerate(self.rounds)])
            if federation.processes.index == 0:
                write_json(output_dir / SPENT_FILE, {"noise_multiplier": self.noise_multiplier, "rounds": self.rounds})

        federation.on_draw = on_draw
        if self.args.noise_source == "seed" and self.noise_multiplier:
            logger.warning(
                '`noise_source` is "seed": whoever knows the seed can take the noise of clients away. Publish nothing.'
            )

    @property
    def rounds(self) -> list[int]:
        """The rounds in which each client was drawn."""
        if self.server is None:
            return [0] * len(self.client_sizes)
        return [int(count) for count in self.server.tensors[SPENT][1:].tolist()]

    def _note(self, rounds: list[int]) -> None:
        assert self.server is not None  # rounds have begun
        self.server.tensors[SPENT] = torch.tensor([self.noise_multiplier, *rounds], dtype=torch.float64)

    def allows_round(self) -> bool:
        target = self.args.example_target_epsilon
        if target is None or self.epsilon([count + 1 for count in self.rounds]) <= target:
            return True
        logger.warning(
            f"The run stops at epsilon {self.epsilon(self.rounds):.4g} for examples: in one more round a client could "
            f"exceed `example_target_epsilon` = {target:g} at `example_delta` = {self.args.example_delta:g}."
        )
        return False

    def spent(self) -> dict[str, float]:
        epsilon = self.epsilon(self.rounds)
        return {"example_epsilon": epsilon} if math.isfinite(epsilon) else {}

    def tellable(self, logs: dict[str, float]) -> dict[str, float]:
        return {name: value for name, value in logs.items() if name not in NOT_TOLD}

    def example_facts(self) -> ExamplePrivacyFacts | None:
        args = self.args
        if self.server is None or not self.noise_multiplier or not any(self.rounds) or args.noise_source == "seed":
            return None
        assert args.example_delta is not None and args.example_clipping_norm is not None  # the arguments are checked
        return ExamplePrivacyFacts(
            epsilon=self.epsilon(self.rounds),
            delta=args.example_delta,
            noise_multiplier=self.noise_multiplier,
            clipping_norm=args.example_clipping_norm,
            most_rounds=max(self.rounds),
            accountant=args.privacy_accountant,
        )

    # The accountant

    def find_noise(self) -> float:
        """Returns the least noise multiplier with which a client stays within the target in all rounds."""
        return self._find_once(self._question, self._worst([self.args.rounds] * len(self.client_sizes)))

    def epsilon(self, rounds: Sequence[int]) -> float:
        """Returns the epsilon of the examples of whom these rounds cost most."""
        if not self.noise_multiplier:
            return math.inf
        worst = self._worst(rounds)
        return max((self._epsilon_once(self.noise_multiplier, *each, self._question) for each in worst), default=0.0)

    @property
    def _question(self) -> tuple[float | None, float | None, str]:
        """Gives the arguments that an answer depends on."""
        return self.args.example_target_epsilon, self.args.example_delta, self.args.privacy_accountant

    def _worst(self, rounds: Sequence[int]) -> tuple[tuple[float, int], ...]:
        """Returns rate and number of steps of clients of whom no other has more of both."""
        found: list[tuple[float, int]] = []
        draws = (poisson_draw(size, self.args) for size in self.client_sizes)
        taken = {(draw.rate, draw.steps * count) for draw, count in zip(draws, rounds, strict=True) if count}
        # By falling rates: only one of more steps than all before can cost more.
        for rate, steps in sorted(taken, reverse=True):
            if not found or steps > found[-1][1]:
                found.append((rate, steps))
        return tuple(found)

    def _find_noise(self, question: tuple[float, float, str], worst: tuple[tuple[float, int], ...]) -> float:
        target, delta, name = question
        z = 0.0
        for rate, steps in worst:
            # The bound by RDP is larger, and another accountant takes long at little noise.
            low, asked = (z, question) if z else (LEAST_NOISE, (target, delta, "rdp"))
            if self._epsilon_once(low, rate, steps, asked) <= target:
                z = low
                continue
            found = self._calibrate("rdp", rate, steps, low, max(2 * z, 1.0))
            # A little less does by another accountant, which takes long at far less.
            z = found if name == "rdp" else self._calibrate(name, rate, steps, 0.6 * found, found)
        return z

    def _calibrate(self, name: str, rate: float, steps: int, low: float, guess: float) -> float:
        dp, args = dp_accounting(), self.args
        return float(
            dp.calibrate_dp_mechanism(
                lambda: self._accountant(name),
                lambda z: dp.SelfComposedDpEvent(self._event(z, rate), steps),
                args.example_target_epsilon,
                args.example_delta,
                dp.LowerEndpointAndGuess(low, guess),
                tol=1e-3,
            )
        )

    def _epsilon(self, z: float, rate: float, steps: int, question: tuple[float, float, str]) -> float:
        _, delta, name = question
        return float(self._accountant(name).compose(self._event(z, rate), steps).get_epsilon(delta))

    def _accountant(self, name: str) -> Any:
        relation = dp_accounting().NeighboringRelation.ADD_OR_REMOVE_ONE
        if name == "pld":
            return import_module("dp_accounting.pld").PLDAccountant(relation, PLD_INTERVAL)
        return import_module("dp_accounting.rdp").RdpAccountant(neighboring_relation=relation)

    def _event(self, z: float, rate: float) -> Any:
        dp = dp_accounting()
        return dp.PoissonSampledDpEvent(rate, dp.GaussianDpEvent(z))


class BothBudgets(NoBudget):
    """
    The accounting of a run with two kinds of privacy, which know nothing of one another.

    Args:
        of_clients ([`PrivacyBudget`]), of_examples ([`ExampleBudget`]): Of the kinds.
    """

    def __init__(self, of_clients: PrivacyBudget, of_examples: ExampleBudget):
        self.of_clients, self.of_examples = of_clients, of_examples

    def begin(self, federation: Federation, output_dir: Path, resumed: Path | None) -> None:
        self.of_clients.begin(federation, output_dir, resumed)
        self.of_examples.begin(federation, output_dir, resumed)

    def allows_round(self) -> bool:
        return self.of_clients.allows_round() and self.of_examples.allows_round()

    def spent(self) -> dict[str, float]:
        return self.of_clients.spent() | self.of_examples.spent()

    def tellable(self, logs: dict[str, float]) -> dict[str, float]:
        return self.of_examples.tellable(self.of_clients.tellable(logs))

    def tellable_rounds(self, reports: list[RoundReport]) -> list[RoundReport]:
        return self.of_clients.tellable_rounds(reports)

    def facts(self) -> PrivacyFacts | None:
        return self.of_clients.facts()

    def example_privacy(self) -> ExamplePrivacy:
        return self.of_examples.example_privacy()

    def example_facts(self) -> ExamplePrivacyFacts | None:
        return self.of_examples.example_facts()


def make_budget(args: FederatedTrainingArguments, client_sizes: Sequence[int]) -> NoBudget:
    """Returns the accounting of a run, of both kinds of privacy."""
    if not args.hides_examples:
        return PrivacyBudget(args, len(client_sizes)) if args.is_private else NoBudget()
    of_examples = ExampleBudget(args, client_sizes)
    return BothBudgets(PrivacyBudget(args, len(client_sizes)), of_examples) if args.is_private else of_examples
