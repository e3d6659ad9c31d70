"""One client's half of a `FederatedTrainer`, at its node."""

from functools import cached_property
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel

from ..data import FederatedDataset, hold_out_client_tests
from ..federation import Federation
from ..reporting import ClientScore
from ..strategies import Strategy
from ..training import FederatedTrainer, FederatedTrainingArguments
from ..training.adapters import check_adapters
from ..training.checks import check_classes
from ..training.client_evaluation import score_clients
from ..training.honoured import check_arguments
from ..training.label_names import settle_label_names
from ..training.precision import train_in_float32


class NodeTrainer(FederatedTrainer):
    """
    Trains the one client whose rows are here, with the loss, optimizer, schedule, collator and checks of a
    [`~training.FederatedTrainer`]. It runs no rounds: [`Node`] asks it for one client's training at a time.

    Args:
        model ([`~transformers.PreTrainedModel`]): As the server's, before any training.
        args ([`~training.FederatedTrainingArguments`]): As the server's; `output_dir`, `use_cpu` and whatever else is
            the machine's are this node's own.
        dataset (`datasets.Dataset`): The client's rows, prepared as the model reads them.
        strategy ([`~strategies.Strategy`]): As the server's.
        label_column (`str`, *optional*, defaults to `"label"`): Column of labels.
        num_labels (`int`, *optional*): Number of classes, when the column holds integers without names.
        client_test_share (`float`, *optional*, defaults to 0): Share of the rows on which nobody trains, and the
            server's model is tested.
        kwargs: As in [`~training.FederatedTrainer`].
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: FederatedTrainingArguments,
        dataset: Dataset,
        strategy: Strategy,
        label_column: str = "label",
        num_labels: int | None = None,
        client_test_share: float = 0.0,
        **kwargs: Any,
    ):
        super().__init__(model, args, strategy=strategy, **kwargs)
        # What a trainer checks that has all clients, less what is the server's matter.
        data = FederatedDataset.from_clients({"here": dataset}, label_column=label_column, num_labels=num_labels)
        if client_test_share:
            data = hold_out_client_tests(data, client_test_share, seed=args.seed)
        train_in_float32(self.model)
        check_arguments(args)
        strategy.check_arguments(args)
        expert = strategy.server_models(self.model)[0]
        check_classes(expert)
        check_adapters(strategy.server_models(self.model), args)
        settle_label_names(self.model, data)
        self.federated_dataset = data

    @property
    def client_size(self) -> int:
        """Rows that the client trains on."""
        return int(self._data.client_sizes[0])

    def client_scores(self, federation: Federation) -> list[ClientScore]:
        """Scores the model on the client's test rows."""
        return score_clients(federation, self._data, [0], self._columns_of_clients(), self.data_collator)

    @cached_property
    def federation(self) -> Federation:
        """The participants at work here; raises `ValueError` for rows or a model that cannot be trained."""
        return self._tried_federation()
