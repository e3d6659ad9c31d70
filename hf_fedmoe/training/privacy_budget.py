"""The accounting of a private run: its noise, what is spent, when it stops, and what may be told of it."""

import math
from functools import cache, lru_cache
from importlib import import_module
from logging import LogRecord, getLogger
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from ..data.counted import counted
from ..federation import (
    AdaptiveNorm,
    ExamplePrivacy,
    Federation,
    FixedNorm,
    GaussianMean,
    RoundReport,
    Server,
    read_json,
    seeded_normals,
    system_normals,
    write_json,
)
from ..reporting import ExamplePrivacyFacts, PrivacyFacts
from .federated_arguments import FederatedTrainingArguments
from .privacy_arguments import RELATIONS, check_noise_of_count


logger = logging.get_logger(__name__)

# In `server.tensors`, and so in checkpoints: the noise multiplier, and how many means were released with it.
SPENT = "privacy.spent"
# In `output_dir`: the same, written before each release. The underscore keeps it from the Hub.
SPENT_FILE = "_privacy_spent.json"
# The width of the steps into which losses are rounded up: dp-accounting's own default.
PLD_INTERVAL = 1e-4
# No less noise is looked for, whatever the target.
LEAST_NOISE = 0.05
# Logged numbers of clients that have no noise.
NOT_TOLD = (
    *("loss", "train_loss", "train_samples_per_second", "bytes_up", "bytes_down", "refused_clients"),
    *("seconds_clients", "seconds_synchronise"),
)


class NoBudget:
    """The accounting of a run that is not private: nothing is spent, and everything is told."""

    def begin(self, federation: Federation, output_dir: Path, resumed: Path | None) -> None:
        """Prepares the rounds of a run that starts, or goes on from a checkpoint."""

    def allows_round(self) -> bool:
        """Tells whether another round stays within the budget."""
        return True

    def spent(self) -> dict[str, float]:
        """Returns what to log of it after a round."""
        return {}

    def tellable(self, logs: dict[str, float]) -> dict[str, float]:
        """Returns what may be told of a log entry."""
        return logs

    def tellable_rounds(self, reports: list[RoundReport]) -> list[RoundReport]:
        """Returns the rounds of which the model card may tell."""
        return reports

    def facts(self) -> PrivacyFacts | None:
        """Returns what the model card says of it."""
        return None

    def example_privacy(self) -> ExamplePrivacy | None:
        """Returns by what clients hide their examples, if they do."""
        return None

    def example_facts(self) -> ExamplePrivacyFacts | None:
        """Returns what the model card says of the privacy of examples."""
        return None


class PrivacyBudget(NoBudget):
    """
    The accounting of a private run.

    Args:
        args ([`FederatedTrainingArguments`]): Of the run.
        num_clients (`int`): Of the federation.
    """

    def __init__(self, args: FederatedTrainingArguments, num_clients: int):
        self.args, self.num_clients = args, num_clients
        self.noise_multiplier = args.noise_multiplier
        self.server: Server | None = None
        # At little noise an answer takes a minute, and rounds, logs and the card ask the same.
        self._epsilon_once, self._loss_once = cache(self._epsilon), lru_cache(maxsize=1)(self._loss_of_one)
        if self.noise_multiplier != 0:
            dp_accounting()  # here, not after hours of training

    def begin(self, federation: Federation, output_dir: Path, resumed: Path | None) -> None:
        """
        Finds the noise, or in a checkpoint what it was and how often it was released, and has `federation` add it. A
        round that was broken off after its release, of which no checkpoint knows, counts too.
        """
        # A trainer that trains once more goes on with what it has released.
        args, server, releases = self.args, federation.server, self.releases
        if resumed is not None:
            self.noise_multiplier, noted = server.tensors[SPENT].tolist()
            known = federation.processes.on_main(lambda: read_json(resumed.parent / SPENT_FILE))
            releases = max(int(noted), 0 if known is None else int(known["releases"]))
        elif self.noise_multiplier is None:
            self.noise_multiplier = self.find_noise()
        assert self.noise_multiplier is not None and args.clipping_norm is not None  # the arguments are checked
        clipping = FixedNorm(args.clipping_norm)
        if args.clipping_quantile is not None:
            check_noise_of_count(self.noise_multiplier, args.clients_per_round)
            clipping = AdaptiveNorm(args.clipping_norm, args.clipping_quantile, args.clients_per_round)
        self.server, self.file = server, output_dir / SPENT_FILE
        self._note(releases)
        federation.mean = GaussianMean(
            server,
            federation.strategy,
            args.clients_per_round,
            self.num_clients,
            self.noise_multiplier,
            clipping,
            system_normals if args.noise_source == "system" else seeded_normals(args.seed),
            self.before_release,
        )
        if args.noise_source == "seed" and self.noise_multiplier:
            logger.warning(
                '`noise_source` is "seed": whoever knows the seed can take the noise away. Publish nothing.'
            )

    def before_release(self) -> None:
        """Notes, on disk too, that the noise is used once more."""
        self._note(self.releases + 1)
        write_json(self.file, {"noise_multiplier": self.noise_multiplier, "releases": self.releases})

    @property
    def releases(self) -> int:
        """The number of means that were released: noted in the main process, whose server reaches the others."""
        return 0 if self.server is None else int(self.server.tensors[SPENT][1].item())

    def _note(self, releases: int) -> None:
        assert self.server is not None  # rounds have begun
        self.server.tensors[SPENT] = torch.tensor([self.noise_multiplier, releases], dtype=torch.float64)

    def allows_round(self) -> bool:
        target = self.args.target_epsilon
        if target is None or self.epsilon(self.releases + 1) <= target:
            return True
        spent = f"{counted(self.releases, 'private mean')}, epsilon {self.epsilon(self.releases):.4g}"
        logger.warning(
            f"The run stops after {spent}: one more would exceed `target_epsilon` = {target:g} at `delta` = "
            f"{self.args.delta:g}."
        )
        return False

    def spent(self) -> dict[str, float]:
        epsilon = self.epsilon(self.releases)
        return {"epsilon": epsilon} if math.isfinite(epsilon) else {}

    def tellable(self, logs: dict[str, float]) -> dict[str, float]:
        return {name: value for name, value in logs.items() if name not in NOT_TOLD}

    def tellable_rounds(self, reports: list[RoundReport]) -> list[RoundReport]:
        return []

    def facts(self) -> PrivacyFacts | None:
        args = self.args
        if not self.noise_multiplier or not self.releases or args.noise_source == "seed":
            return None
        assert args.delta is not None and args.clipping_norm is not None  # the arguments are checked
        return PrivacyFacts(
            epsilon=self.epsilon(self.releases),
            delta=args.delta,
            relation=RELATIONS[args.client_choice],
            draw=f"{args.client_choice}, {args.clients_per_round} of {self.num_clients} clients",
            noise_multiplier=self.noise_multiplier,
            clipping_norm=args.clipping_norm,
            clipping_quantile=args.clipping_quantile,
            releases=self.releases,
            accountant=args.privacy_accountant,
        )

    # The accountant

    def find_noise(self) -> float:
        """Returns the least noise multiplier with which all rounds stay within the target."""
        args = self.args
        assert args.target_epsilon is not None  # there is no noise, the arguments are checked
        if self._epsilon(LEAST_NOISE, args.rounds, (args.delta, "rdp")) <= args.target_epsilon:
            return LEAST_NOISE
        found = self._find_noise("rdp", LEAST_NOISE, 1.0)
        if args.privacy_accountant == "rdp":
            return found
        # A little less does, and far less would take hours to account for.
        return self._find_noise(args.privacy_accountant, 0.6 * found, found)

    def _find_noise(self, accountant: str, low: float, guess: float) -> float:
        dp, args = dp_accounting(), self.args
        return float(
            dp.calibrate_dp_mechanism(
                lambda: self._accountant(accountant),
                lambda z: dp.SelfComposedDpEvent(self._event(z), args.rounds),
                args.target_epsilon,
                args.delta,
                dp.LowerEndpointAndGuess(low, guess),
                tol=1e-3,
            )
        )

    def epsilon(self, releases: int) -> float:
        """Returns the epsilon of so many private means; computes each once."""
        if not self.noise_multiplier:
            return math.inf
        # Arguments can be given other values between two trainings, or before the card is written.
        return self._epsilon_once(self.noise_multiplier, releases, self._question) if releases else 0.0

    @property
    def _question(self) -> tuple[Any, ...]:
        """Gives all but the noise and its number that an answer depends on."""
        args = self.args
        return args.delta, args.privacy_accountant, args.client_choice, args.clients_per_round, self.num_clients

    def _epsilon(self, noise_multiplier: float, releases: int, question: tuple[Any, ...]) -> float:
        delta, name, *_ = question
        if name == "pld":
            # As its accountant composes, which would find the loss of one mean anew each time.
            none, one = self._loss_once(noise_multiplier, self.args.clients_per_round / self.num_clients)
            return float(none.compose(one.self_compose(releases)).get_epsilon_for_delta(delta))
        accountant = self._accountant(name).compose(self._event(noise_multiplier), releases)
        return float(accountant.get_epsilon(delta))

    def _loss_of_one(self, noise_multiplier: float, rate: float) -> tuple[Any, Any]:
        """Returns the privacy loss distributions of no mean, and of one of clients drawn by the Poisson scheme."""
        losses = import_module("dp_accounting.pld.privacy_loss_distribution")
        of_one = losses.from_gaussian_mechanism(
            noise_multiplier,
            value_discretization_interval=PLD_INTERVAL,
            sampling_prob=rate,
            neighboring_relation=dp_accounting().NeighboringRelation.ADD_OR_REMOVE_ONE,
        )
        return losses.identity(value_discretization_interval=PLD_INTERVAL), of_one

    def _accountant(self, name: str) -> Any:
        relations = dp_accounting().NeighboringRelation
        relation = relations.ADD_OR_REMOVE_ONE if self.args.client_choice == "poisson" else relations.REPLACE_ONE
        if name == "pld":
            return import_module("dp_accounting.pld").PLDAccountant(relation, PLD_INTERVAL)
        return import_module("dp_accounting.rdp").RdpAccountant(neighboring_relation=relation)

    def _event(self, noise_multiplier: float) -> Any:
        dp, drawn = dp_accounting(), self.args.clients_per_round
        if self.args.client_choice == "poisson":
            return dp.PoissonSampledDpEvent(drawn / self.num_clients, dp.GaussianDpEvent(noise_multiplier))
        # Of two clients that are exchanged one update goes and another comes: the sum moves by up to 2 S, and the
        # bound for draws of a fixed size takes the noise in units of that.
        event = dp.GaussianDpEvent(noise_multiplier / 2)
        return dp.SampledWithoutReplacementDpEvent(self.num_clients, drawn, event)


def dp_accounting() -> Any:
    """Imports `dp_accounting`; raises `ImportError` that names the extra where it is not installed."""
    try:
        package = import_module("dp_accounting")
    except ImportError as error:
        raise ImportError(
            "A private run is accounted for by dp-accounting, which is missing: `pip install hf_fedmoe[privacy]`."
        ) from error
    # An order of Renyi's divergence that it leaves out makes epsilon larger, and it says so each time.
    getLogger("absl").addFilter(_tells_of_no_order)
    return package


def _tells_of_no_order(record: LogRecord) -> bool:
    return "Excluding this order" not in record.getMessage()
