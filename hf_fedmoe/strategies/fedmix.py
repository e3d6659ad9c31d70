"""FedMix: Reisser et al. 2021, "Federated Mixture of Experts", as Fed-MoE compares itself with it ("Avg-MoE")."""

from torch import nn
from transformers import PreTrainedModel

from ..federation import Strategy
from ..models import FedMoEPreTrainedModel


class FedMix(Strategy):
    """
    Every client trains a whole mixture, experts and gate, by the mixture's loss; the server averages all of it. (The
    clients of Reisser et al. also select which experts they train; here all of them have all experts.)

    The method's mixture has no main expert, a gate that is a model, and K routed experts, 2 as a rule. With a main
    expert, it and alpha are trained and averaged like the rest. The mixture's own `entropy_weight` and
    `balance_weight` hold on the clients; 0 turns them off.

    Routed experts with one start get nearly equal gradients: they stay alike, or the gate gives all to one of them.
    Let each have a head of its own, as `EnsembleForSequenceClassification.from_classifier(model, num_models=2)` does:
    its `models` go into `FedMoEForSequenceClassification.from_experts`. Clients train the dense mixture; with `top_l`
    = K and `top_l_weighting="renormalize"` it is also what predicts.
    """

    name = "fedmix"
    trains = "gated_experts"

    def server_models(self, model: PreTrainedModel) -> list[nn.Module]:
        if not isinstance(model, FedMoEPreTrainedModel):
            raise ValueError(
                f"FedMix trains a mixture, `model` is a {type(model).__name__}: build one of K classifiers and a gate "
                "with K labels, `FedMoEForSequenceClassification.from_experts([], experts, gate=gate)`."
            )
        return [model]
