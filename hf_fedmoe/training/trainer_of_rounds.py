"""The base of the parts of a [`FederatedTrainer`]: attributes that they have in common, for type checkers."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from ..data import FederatedDataset
from ..federation import ClientStore, Federation, RoundReport
from ..models import AdapterExpert
from ..reporting import ClientScore
from ..strategies import Strategy
from .federated_arguments import FederatedTrainingArguments


class TrainerOfRounds(Trainer):
    """The trainer of transformers, and what the parts of [`FederatedTrainer`], which sets it, read of one another."""

    args: FederatedTrainingArguments
    model: PreTrainedModel
    strategy: Strategy
    federated_dataset: FederatedDataset | None
    rounds: list[RoundReport]
    never_accepted: dict[int, str]
    client_table: list[ClientScore]
    train_data_collator: Callable
    _signature_columns: list[str] | None  # type: ignore[assignment]  # transformers declares what it is at first
    _active_federation: Federation | None
    # Of the last round: the strategy's tensors, the integer buffers, the client store.
    _left: tuple[dict[str, Tensor], list[dict[str, Tensor]], ClientStore] | None

    @property
    def _data(self) -> FederatedDataset:
        """The clients, of a trainer that has been given some."""
        assert self.federated_dataset is not None
        return self.federated_dataset

    @property
    def _output_dir(self) -> Path:
        assert self.args.output_dir is not None  # transformers has filled it in
        return Path(self.args.output_dir)

    def _federation(self) -> Federation:
        """Makes what rounds work on."""
        raise NotImplementedError


def client_model_of(expert: nn.Module) -> PreTrainedModel:
    """Returns what runs of a client's model: the base of an adapter, or the model itself."""
    model = expert.base if isinstance(expert, AdapterExpert) else expert
    assert isinstance(model, PreTrainedModel)
    return model
