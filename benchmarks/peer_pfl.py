"""Apple's pfl: its simulated backend in one process, federated averaging, no privacy mechanism."""

import itertools
from functools import partial
from typing import Any

import torch
from peer_work import Gate, Work, enter, trainable
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByUser
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn


class Client(nn.Module):
    """A model with the two methods that pfl asks for."""

    def __init__(self, model: nn.Module, work: Work):
        super().__init__()
        self.model, self.work = model, work

    def loss(self, **batch: Tensor) -> Tensor:
        return self.work.loss(self.model, **batch)

    def metrics(self, **batch: Tensor) -> dict[str, Any]:
        return {}  # pfl evaluates clients before and after training in its first round: nothing is computed


class GateBeforeRounds(TrainingProcessCallback):
    def __init__(self, gate: Gate, model: nn.Module):
        self.gate, self.weights = gate, partial(trainable, model)

    def on_train_begin(self, *, model: Any) -> Metrics:
        self.gate.wait(self.weights)
        return Metrics()

    def after_central_iteration(self, aggregate_metrics: Any, model: Any, **kwargs: Any) -> tuple[bool, Metrics]:
        self.gate.wait(self.weights)
        return False, Metrics()


def main() -> None:
    work, gate = enter()
    module = Client(work.model(), work)
    model = PyTorchModel(module, work.make_optimizer, torch.optim.SGD(trainable(module).values(), lr=1.0))

    def make_client(draw: int) -> PyTorchTensorDataset:
        rows = work.begin_client(*divmod(draw, work.participants))
        return PyTorchTensorDataset({name: column[rows] for name, column in work.data.items()})

    draws = itertools.count()
    data = FederatedDataset(make_client, lambda: next(draws))
    backend = SimulatedBackend(training_data=data, val_data=data, postprocessors=[WeightByUser()])
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=work.rounds,
            evaluation_frequency=work.rounds,
            train_cohort_size=work.participants,
            val_cohort_size=0,
        ),
        backend,
        model,
        NNTrainHyperParams(
            local_num_epochs=1, local_learning_rate=work.learning_rate, local_batch_size=work.batch_size
        ),
        NNEvalHyperParams(local_batch_size=None),
        callbacks=[GateBeforeRounds(gate, module.model)],
    )
