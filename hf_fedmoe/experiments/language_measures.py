"""
Measures language models of owners of text: bits per byte and perplexity by domain, tokens a second, owners by models
of their own, and the ways to use the experts of a mixture.

Shape suffixes: N rows, T tokens.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import mean
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..data import FederatedDataset
from ..models import FedMoEForCausalLM
from ..reporting import Metric
from ..strategies import Strategy
from ..training import FederatedTrainer
from .language_experiment import DOMAIN, LanguageExperiment
from .language_layer_routers import NAMES, layer_routers, using
from .language_scores import (
    BASE,
    BATCH,
    SOFT,
    TOP_1,
    Way,
    bits_per_byte,
    bytes_of,
    log_likelihoods,
    remembered,
    single_ways,
    ways_of,
)


BITS: str = "bits_per_byte"
PERPLEXITY: str = "perplexity"
SPEED: str = "tokens_per_second"
CLIENTS: str = "clients_bits_per_byte"
# Ways to use a mixture's experts, by the names of rows below its own.
WAYS = {
    "top_1": TOP_1,
    "uniform_ensemble": "uniform ensemble",
    "soup": "soup",
    "likelihood_router": "likelihood router",
    "mixture_or_base": "mixture or base by likelihood",
    "likelihood_weights": "mixture, weights by likelihood",
}
LAYER_ROUTERS = dict(zip(("arrow", "dume", "flexolmo_rows"), NAMES, strict=True))
# What is no way by itself, but an expert that is chosen.
BEST, BEST_OF_TEST, ORACLE = "best_expert", "best_expert_of_test", "oracle_expert"


@dataclass
class Domain:
    """
    A domain's rows that are reported on.

    Args:
        ids_NT (`torch.Tensor` of shape `(N, T)`): Token ids.
        count (`int`): Bytes of the tokens after the first one of each row.
    """

    ids_NT: Tensor
    count: int


def domains_of(data: FederatedDataset, tokenizer: PreTrainedTokenizerBase) -> dict[str, Domain]:
    """Gives the test's rows by domain."""
    assert data.test is not None
    names, found = np.array(data.test[DOMAIN]), {}
    for name in dict.fromkeys(names.tolist()):
        ids_NT = torch.tensor(data.test.select(np.flatnonzero(names == name))["input_ids"][:])
        found[name] = Domain(ids_NT, bytes_of(tokenizer, ids_NT))
    return found


def watched_of(data: FederatedDataset, tokenizer: PreTrainedTokenizerBase, owners: Sequence[str]) -> dict[str, Domain]:
    """Gives the rows of each owner that rounds are watched on, as many of one as of another; none if none are."""
    if data.validation is None:
        return {}
    parts_KNT = torch.tensor(data.validation["input_ids"][:]).chunk(len(owners))
    return {name: Domain(ids_NT, bytes_of(tokenizer, ids_NT)) for name, ids_NT in zip(owners, parts_KNT, strict=True)}


def metrics_of_ways(domains: Sequence[str]) -> dict[str, Metric]:
    """Returns the metrics of a model, or of a way to use several."""
    bits = {f"{BITS}_{name}": Metric(name, 1, 3, lower_is_better=True) for name in domains}
    perplexities = {f"{PERPLEXITY}_{name}": Metric(f"{name}, perplexity", 1, 1, True) for name in domains}
    return {
        BITS: Metric("bits per byte", 1, 3, lower_is_better=True),
        PERPLEXITY: Metric(PERPLEXITY, 1, 1, lower_is_better=True),
        SPEED: Metric("tokens a second", 1, 0),
        **bits,
        **perplexities,
    }


def measure_way(way: Way, domains: Mapping[str, Domain], owners: Sequence[str]) -> dict[str, float]:
    """
    Measures a model, or a way to use several.

    Args:
        way (`Callable`): From token ids to the logarithms of the probabilities of those after the first.
        domains (`Mapping[str, Domain]`): From [`domains_of`].
        owners (`Sequence[str]`): The domains of owners, of which `bits_per_byte` is the mean, and `perplexity` the
            exponential of the mean loss.
    """
    found = {name: way(domain.ids_NT) for name, domain in domains.items()}
    bits = {name: bits_per_byte(found[name], domain.count) for name, domain in domains.items()}
    losses = {name: -found_NS.double().mean().item() for name, found_NS in found.items()}
    return _summary(bits, losses, owners)


def measure_speed(way: Way, domains: Mapping[str, Domain]) -> dict[str, float]:
    """Measures how many tokens a second are read, on a batch of the first domain and the second time."""
    ids_BT = next(iter(domains.values())).ids_NT[:BATCH]
    way(ids_BT)
    began = time.perf_counter()
    way(ids_BT)
    return {SPEED: ids_BT.numel() / (time.perf_counter() - began)}


def _summary(bits: Mapping[str, float], losses: Mapping[str, float], owners: Sequence[str]) -> dict[str, float]:
    return {
        BITS: mean(bits[name] for name in owners),
        PERPLEXITY: math.exp(mean(losses[name] for name in owners)),
        **{f"{BITS}_{name}": value for name, value in bits.items()},
        **{f"{PERPLEXITY}_{name}": math.exp(value) for name, value in losses.items()},
    }


def part_names(experiment: LanguageExperiment) -> list[str]:
    """Lists the ways to use the experts of a mixture that have metrics of their own."""
    without = [] if experiment.opt_out is None else [f"without_{experiment.opt_out}"]
    experts = [f"expert_{name}" for name in experiment.owners]
    # One that is chosen needs text to choose by; the others are chosen by what is reported on, and bounds.
    best = [BEST] if experiment.is_watched else []
    return [*WAYS, *LAYER_ROUTERS, *without, *experts, *best, BEST_OF_TEST, ORACLE]


def ways_by_forwards(model: FedMoEForCausalLM, single: Mapping[str, Way]) -> dict[str, Way]:
    """
    Gives the ways to use a mixture's experts that begin with whole forwards, by the names of [`part_names`].

    Args:
        model ([`FedMoEForCausalLM`]): The mixture.
        single (`Mapping[str, Way]`): From [`single_ways`], as they are or remembered.
    """
    named = ways_of(model, single)
    experts = {f"expert_{name}": single[name] for name in single if name not in (BASE, SOFT)}
    return {part: named[name] for part, name in WAYS.items()} | experts


def ways_of_others(model: FedMoEForCausalLM, experiment: LanguageExperiment, data: FederatedDataset) -> dict[str, Way]:
    """
    Gives the ways that are other mixtures: routed in each layer, or without an owner, by the names of [`part_names`].

    Args:
        model ([`FedMoEForCausalLM`]): The mixture.
        experiment ([`LanguageExperiment`]): Its settings.
        data ([`~data.FederatedDataset`]): Of the owners, by whose text routers in layers are found.
    """
    texts = {name: torch.tensor(data.client(name)["input_ids"][:]) for name in experiment.owners}
    routers = layer_routers(model, texts)
    ways: dict[str, Way] = {part: partial(_by_layer, model, routers[name]) for part, name in LAYER_ROUTERS.items()}
    if experiment.opt_out is not None:
        ways[f"without_{experiment.opt_out}"] = partial(log_likelihoods, model.without(experiment.opt_out))
    return ways


def _by_layer(model: FedMoEForCausalLM, router: Any, ids_NT: Tensor) -> Tensor:
    with using(model, router):
        return log_likelihoods(model.base, ids_NT)


def measure_parts(
    model: FedMoEForCausalLM,
    experiment: LanguageExperiment,
    data: FederatedDataset,
    domains: Mapping[str, Domain],
    watched: Mapping[str, Domain],
) -> dict[str, float]:
    """
    Measures the ways to use a mixture's experts: all that are told, the best single expert as the watched rows choose
    it and as the reported ones would, and the oracle by domain.

    Args:
        model ([`FedMoEForCausalLM`]), experiment ([`LanguageExperiment`]), data ([`~data.FederatedDataset`]):
            As in [`ways_of_others`].
        domains (`Mapping[str, Domain]`): From [`domains_of`].
        watched (`Mapping[str, Domain]`): From [`watched_of`].

    Returns:
        `dict[str, float]`: Each metric with the part's name before it.
    """
    owners = experiment.owners
    single, others = single_ways(model, owners), ways_of_others(model, experiment, data)
    # A figure takes no more forwards than there must be, but what is timed takes its own.
    told = ways_by_forwards(model, {name: remembered(way) for name, way in single.items()}) | others
    timed = ways_by_forwards(model, single) | others
    found = {part: measure_way(way, domains, owners) for part, way in told.items()}
    for part, way in timed.items():
        found[part] |= measure_speed(way, domains)
    experts = {name: found[f"expert_{name}"] for name in owners}
    if watched:
        by_watched = {name: measure_way(single[name], watched, owners)[BITS] for name in owners}
        found[BEST] = experts[min(owners, key=lambda name: by_watched[name])]
    found[BEST_OF_TEST] = min(experts.values(), key=lambda scores: scores[BITS])
    bits = {name: scores[f"{BITS}_{name}"] for name, scores in experts.items()}
    losses = {name: math.log(scores[f"{PERPLEXITY}_{name}"]) for name, scores in experts.items()}
    found[ORACLE] = _summary(bits, losses, owners)
    return {f"{part}_{name}": value for part, scores in found.items() for name, value in scores.items()}


def bits_of_clients(
    trainer: FederatedTrainer, domains: Mapping[str, Domain], owners: Sequence[str], served: float
) -> float:
    """
    Measures owners on their own text, each by the model that the method has for it, and returns the mean.

    Args:
        trainer ([`FederatedTrainer`]): After its rounds.
        domains (`Mapping[str, Domain]`), owners (`Sequence[str]`): As in [`measure_way`].
        served (`float`): What the server's model has, which is that of all where a method has no others.
    """
    if type(trainer.strategy).personal_model is Strategy.personal_model:
        return served
    found = []
    for name in owners:
        model: Any = trainer.personalize(name)
        found.append(bits_per_byte(log_likelihoods(model, domains[name].ids_NT), domains[name].count))
    return mean(found)
