"""The arguments of differential privacy, and what must hold before a private run starts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn
from transformers.utils import logging

from ..federation import Strategy, why_not_private


logger = logging.get_logger(__name__)

ACCOUNTANTS = ("rdp", "pld")
NOISE_SOURCES = ("system", "seed")
# By the draw, which clients' federations are as good as the same to whoever sees the models.
RELATIONS = {"poisson": "adding or leaving out one client", "uniform": "exchanging the data of one client"}


@dataclass
class PrivacyArguments:
    """
    Arguments of client-level differential privacy, see docs/privacy.md. A run is private with `noise_multiplier` or
    `target_epsilon`; both together stop before that epsilon is exceeded.

    Args:
        noise_multiplier (`float`, *optional*):
            z: noise of deviation z times `clipping_norm` goes onto the sum of a round's updates. 0 only clips.
        target_epsilon (`float`, *optional*):
            Epsilon that is not exceeded: the run stops before. Without `noise_multiplier` the least noise is found
            with which all `rounds` stay within it.
        delta (`float`, *optional*):
            Of the epsilon; less than 1 / number of clients.
        clipping_norm (`float`, *optional*):
            S, the norm to which the server shortens each client's update; infinity only without noise.
        clipping_quantile (`float`, *optional*):
            If given, the norm moves to this quantile of the updates' norms, `clipping_norm` being the first one
            (Andrew et al. 2021; their default is 0.5). Its own noise is counted.
        privacy_accountant (`str`, *optional*, defaults to `"rdp"`):
            How epsilon is counted, both by `dp-accounting`: `"rdp"`, or `"pld"`, which is tighter, slower, and there
            for `client_choice="poisson"` only.
        noise_source (`str`, *optional*, defaults to `"system"`):
            Where the noise and the draw of clients come from: `"system"`, the operating system's entropy, or `"seed"`,
            for experiments that are to be repeated: no privacy against whoever knows the seed, which is in every
            checkpoint.
    """

    noise_multiplier: float | None = field(default=None, metadata={"help": "z, the noise in clipping norms."})
    target_epsilon: float | None = field(default=None, metadata={"help": "Epsilon that the run stops before."})
    delta: float | None = field(default=None, metadata={"help": "Of the epsilon; less than 1 / clients."})
    clipping_norm: float | None = field(default=None, metadata={"help": "S, to which the server shortens updates."})
    clipping_quantile: float | None = field(default=None, metadata={"help": "To which quantile the norm moves."})
    privacy_accountant: str = field(default="rdp", metadata={"help": f"One of {', '.join(ACCOUNTANTS)}."})
    noise_source: str = field(default="system", metadata={"help": f"One of {', '.join(NOISE_SOURCES)}."})

    @property
    def is_private(self) -> bool:
        """Tells whether the server's mean is clipped and noised."""
        return self.noise_multiplier is not None or self.target_epsilon is not None


def check_privacy_arguments(args: PrivacyArguments, client_choice: str, clients_per_round: int) -> None:
    """Raises `ValueError` for arguments of privacy that contradict one another; `args` are all of a run."""
    if args.privacy_accountant not in ACCOUNTANTS:
        raise ValueError(f'`privacy_accountant` is {args.privacy_accountant!r}: choose "rdp" or "pld".')
    if args.noise_source not in NOISE_SOURCES:
        raise ValueError(f'`noise_source` is {args.noise_source!r}: choose "system" or "seed".')
    if not args.is_private:
        return _check_not_private(args, client_choice)
    if client_choice not in RELATIONS:
        raise ValueError(
            f"`client_choice` is {client_choice!r}, a draw of which no accounting of privacy knows: choose "
            '"poisson" or "uniform".'
        )
    for name, least in (("noise_multiplier", 0.0), ("target_epsilon", math.ulp(0.0))):
        value = vars(args)[name]
        if value is not None and not least <= value < math.inf:
            raise ValueError(f"`{name}` is {value}: give a number of 0 or more, an epsilon above 0.")
    norm = args.clipping_norm
    if norm is None or not norm > 0 or (norm == math.inf and args.noise_multiplier != 0):
        raise ValueError(
            f"`clipping_norm` is {norm}: noise hides updates of a norm that is bounded, give it, above 0: about the "
            "median norm of updates in a run without privacy, or a guess and `clipping_quantile=0.5`."
        )
    if args.noise_multiplier == 0 and args.target_epsilon is not None:
        raise ValueError(
            f"`noise_multiplier` is 0 and `target_epsilon` {args.target_epsilon}: without noise there is no epsilon, "
            "leave one of them out."
        )
    if args.noise_multiplier != 0 and not 0 < (args.delta or 0) < 1:
        raise ValueError(f"`delta` is {args.delta}: give less than 1 / number of clients, above 0.")
    if args.privacy_accountant == "pld" and client_choice != "poisson":
        raise ValueError(
            f"`privacy_accountant` is 'pld' and `client_choice` {client_choice!r}, for which there is \"rdp\" only: "
            'choose that, or client_choice="poisson".'
        )
    if args.clipping_quantile is not None:
        _check_quantile(args.clipping_quantile, norm, args.noise_multiplier, clients_per_round)


def _check_not_private(args: PrivacyArguments, client_choice: str) -> None:
    remedy = "give `noise_multiplier` or `target_epsilon` too, or leave it out"
    for name in ("delta", "clipping_norm", "clipping_quantile"):
        if vars(args)[name] is not None:
            raise ValueError(f"`{name}` is {vars(args)[name]}, which makes no run private by itself: {remedy}.")
    if client_choice == "poisson":
        raise ValueError(
            "`client_choice` is 'poisson', which may draw nobody, and of nobody there is no mean but a private one: "
            'give `noise_multiplier` or `target_epsilon` too, or choose "uniform".'
        )


def _check_quantile(quantile: float, norm: float, noise_multiplier: float | None, clients_per_round: int) -> None:
    if not 0 < quantile < 1 or norm == math.inf:
        raise ValueError(
            f"`clipping_quantile` is {quantile} and `clipping_norm` {norm}: give a share in (0, 1), and a norm to "
            "begin with."
        )
    check_noise_of_count(noise_multiplier or 0.0, clients_per_round)


def check_noise_of_count(noise_multiplier: float, clients_per_round: int) -> None:
    """Raises `ValueError` where the noise on the count of unclipped updates alone would spend all of the budget."""
    if noise_multiplier >= clients_per_round / 10:
        raise ValueError(
            f"The noise multiplier is {noise_multiplier:.3g}, and with `clipping_quantile` and `clients_per_round` = "
            f"{clients_per_round} it must be below {clients_per_round / 10:g}: draw more clients, or leave "
            "`clipping_quantile` out."
        )


def check_private_run(
    args: PrivacyArguments,
    strategy: Strategy,
    experts: Sequence[nn.Module],
    num_clients: int,
    lora_fusion: str,
    client_parallelism: str | None,
) -> None:
    """Raises `ValueError` for a method, a model or clients with which a run cannot be private; says nothing else."""
    if not args.is_private:
        return
    name = "noise_multiplier" if args.noise_multiplier is not None else "target_epsilon"
    begin = f"`{name}` is {vars(args)[name]}, but"
    if reason := why_not_private(strategy):
        raise ValueError(
            f"{begin} {strategy.name!r} cannot be made private: {reason}. Choose a method that docs/privacy.md lists, "
            "or leave it out."
        )
    for buffer, _ in experts[0].named_buffers():
        if buffer.endswith("running_mean"):
            raise ValueError(
                f"{begin} `{buffer}` of the model is a statistic of a client's examples, which no norm bounds: choose "
                "a model with layer or group normalisation."
            )
    if args.delta is not None and args.delta >= 1 / num_clients:
        raise ValueError(
            f"`delta` is {args.delta} and there are {num_clients} clients: to publish all of one client would be "
            f"private by that, give less than {1 / num_clients:.2g}."
        )
    if client_parallelism == "sums":
        raise ValueError(
            f"{begin} `client_parallelism` is 'sums', where uploads are added before the server can shorten each: "
            'choose "clients".'
        )
    if any(".lora_" in parameter for parameter, _ in experts[0].named_parameters()):
        _check_lora(begin, lora_fusion)


def _check_lora(begin: str, lora_fusion: str) -> None:
    if lora_fusion == "svd":
        raise ValueError(
            f"{begin} `lora_fusion` is {lora_fusion!r}, and products of adapters are no sum of clipped updates: "
            'choose lora_fusion="ffa", where B alone is trained and noise goes into the model linearly.'
        )
    if lora_fusion == "factors":
        logger.warning(
            '`lora_fusion` is "factors": A and B have noise each, and the model that of both multiplied. Better take '
            '"ffa", where only B has.'
        )
