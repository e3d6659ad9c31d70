"""The models that methods train, by [`~strategies.Strategy.trains`], built around an experiment's classifier."""

from collections.abc import Callable

from transformers import PreTrainedModel

from ..models import EnsemblePreTrainedModel, FedMoEPreTrainedModel, MultiHeadPreTrainedModel
from ..strategies import freeze_common_expert
from .classifier_experiment import ClassifierExperiment


# Trains a model alone on the reserved set, in place.
TrainAlone = Callable[[PreTrainedModel], None]


def classifier(
    expert: PreTrainedModel, experiment: ClassifierExperiment, seed: int, train_alone: TrainAlone
) -> PreTrainedModel:
    """Returns the classifier itself."""
    return expert


def ensemble(
    expert: PreTrainedModel, experiment: ClassifierExperiment, seed: int, train_alone: TrainAlone
) -> EnsemblePreTrainedModel:
    """Returns `num_models` classifiers with heads of their own."""
    return experiment.ensemble_class.from_classifier(expert, experiment.num_models, seed)


def heads(
    expert: PreTrainedModel, experiment: ClassifierExperiment, seed: int, train_alone: TrainAlone
) -> MultiHeadPreTrainedModel:
    """Returns a classifier of `num_models` heads."""
    return experiment.multi_head_class.from_classifier(expert, experiment.num_models, seed)


def mixture(
    expert: PreTrainedModel, experiment: ClassifierExperiment, seed: int, train_alone: TrainAlone
) -> FedMoEPreTrainedModel:
    """Returns a mixture whose experts all start as the classifier, whole or with adapters."""
    own_gate = experiment.gate not in ("main_features", "adapter")
    return experiment.mixture_class.from_expert(
        expert,
        gate=experiment.make_gate(experiment.num_routed_experts) if own_gate else experiment.gate,
        num_main_experts=experiment.num_main_experts,
        num_routed_experts=experiment.num_routed_experts,
        top_l=experiment.top_l,
        peft_config=experiment.peft_config(),
    )


def mixture_of_prototypes(
    expert: PreTrainedModel, experiment: ClassifierExperiment, seed: int, train_alone: TrainAlone
) -> FedMoEPreTrainedModel:
    """Returns a mixture whose experts, and the gate but for its head, start as the classifier."""
    check_whole_experts(experiment)
    return experiment.mixture_class.from_expert(
        expert,
        gate="prototypes",
        num_main_experts=experiment.num_main_experts,
        num_routed_experts=experiment.num_routed_experts,
        top_l=experiment.top_l,
    )


def gated_experts(
    expert: PreTrainedModel, experiment: ClassifierExperiment, seed: int, train_alone: TrainAlone
) -> FedMoEPreTrainedModel:
    """
    Returns a mixture of `num_models` experts with heads of their own, since equal ones stay equal, and a gate which is
    a model too.
    """
    check_whole_experts(experiment)
    models = ensemble(expert, experiment, seed, train_alone).models
    experts = [each for each in models if isinstance(each, PreTrainedModel)]
    gate = experiment.make_gate(experiment.num_models)
    return experiment.mixture_class.from_experts(
        [], experts, gate=gate, top_l=experiment.num_models, top_l_weighting="renormalize"
    )


def frozen_common_mixture(
    expert: PreTrainedModel, experiment: ClassifierExperiment, seed: int, train_alone: TrainAlone
) -> FedMoEPreTrainedModel:
    """
    Returns a mixture of routed experts that start as those of all methods do, and a frozen common expert, which is
    trained on the reserved set first: from random weights its features would tell the gate nothing.
    """
    check_whole_experts(experiment)
    model = experiment.mixture_class.from_expert(expert, num_routed_experts=experiment.num_routed_experts)
    train_alone(expert)
    model.main_experts[0].load_state_dict(expert.state_dict())
    return freeze_common_expert(model)


def check_whole_experts(experiment: ClassifierExperiment) -> None:
    """Raises `ValueError` where adapters are asked for."""
    if experiment.peft_config() is not None:
        raise ValueError("`peft` is 'lora', but this method has whole experts here: leave it out for this method.")


MODELS = {
    build.__name__: build
    for build in (
        classifier,
        ensemble,
        heads,
        mixture,
        mixture_of_prototypes,
        gated_experts,
        frozen_common_mixture,
    )
}
# Of these the experts have adapters, if any, and not what is around them.
MIXTURES = ("mixture", "mixture_of_prototypes", "gated_experts", "frozen_common_mixture")
