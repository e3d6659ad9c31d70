"""`FederatedTrainer` whose clients are elsewhere."""

import os
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.trainer_utils import TrainOutput

from ..federation import EachItsOwn, Participants, overrides
from ..reporting import ClientScore, summarise_clients, write_client_table
from ..training import FederatedTrainer, FederatedTrainingArguments
from ..training.client_evaluation import CLIENT_TABLE_NAME
from ..training.resuming import numbered_checkpoints
from .link import Link
from .message_engine import MessageEngine
from .node_tests import ask_for_tests
from .roster import MAX_EXAMPLES, Identity, Roster
from .server_dataset import ServerDataset
from .travel import frozen_digest, layout_digest


class ServerTrainer(FederatedTrainer):
    """
    A [`~training.FederatedTrainer`] whose clients are trained at nodes, which a link leads to. Everything else, from
    strategies to checkpoints and the card, is the same; no row of a client is here.

    Args:
        model ([`~transformers.PreTrainedModel`]), args ([`FederatedTrainingArguments`]): As in [`FederatedTrainer`].
        train_dataset ([`ServerDataset`]): The server's rows, and how many clients there are.
        link ([`Link`]): To the nodes.
        settings (`dict`, *optional*): Sent to nodes, by which they make model, arguments and strategy.
        min_clients (`int`, *optional*, defaults to 1): Nodes that the first round waits for, and uploads that each
            round waits for, unless it has fewer participants.
        round_timeout (`float`, *optional*, defaults to 600): Seconds after which a round goes on without those who
            have not answered.
        max_client_examples (`int`, *optional*, defaults to 1000000): As many examples may a client say that it has
            when it comes, and never more afterwards: methods weigh clients by them.
        client_test_share (`float`, *optional*, defaults to 0): Share of a client's rows that its node holds out, for
            [`ServerTrainer.evaluate_clients`].
        kwargs: As in [`FederatedTrainer`].
    """

    _where_clients_are = "Clients are elsewhere, at their nodes (docs/deployment.md)."

    def __init__(
        self,
        model: PreTrainedModel,
        args: FederatedTrainingArguments,
        train_dataset: ServerDataset,
        link: Link,
        settings: dict[str, Any] | None = None,
        min_clients: int = 1,
        round_timeout: float = 600.0,
        max_client_examples: int = MAX_EXAMPLES,
        client_test_share: float = 0.0,
        **kwargs: Any,
    ):
        if not isinstance(train_dataset, ServerDataset):
            raise ValueError(
                f"`train_dataset` is a {type(train_dataset).__name__}, but clients are elsewhere: give a "
                "`ServerDataset` of the server's own rows."
            )
        if not 1 <= min_clients <= train_dataset.num_clients:
            raise ValueError(f"`min_clients` is {min_clients}: give 1 to {train_dataset.num_clients}, all clients.")
        if not round_timeout > 0:
            raise ValueError(f"`round_timeout` is {round_timeout}: give seconds above 0.")
        if max_client_examples < 1:
            raise ValueError(f"`max_client_examples` is {max_client_examples}: give at least 1.")
        super().__init__(model, args, train_dataset, **kwargs)
        MessageEngine.refuse(self.strategy.server_models(model)[0], args, self.strategy)
        if client_test_share and overrides(self.strategy, "personal_model"):
            raise ValueError(
                f"`client_test_share` is {client_test_share}, but {self.strategy.name!r} makes a personal model for "
                "each client, and nodes test the server's: leave it out, or choose a method of one model."
            )
        self.min_clients, self.round_timeout = min_clients, round_timeout
        self.client_test_share = client_test_share
        self.roster = Roster(link, self._output_dir, train_dataset.sizes_M, settings or {}, max_client_examples)

    def train(
        self, resume_from_checkpoint: str | os.PathLike | bool | None = None, *args: Any, **kwargs: Any
    ) -> TrainOutput:
        """Runs the rounds once `min_clients` nodes are there; see [`FederatedTrainer.train`]."""
        self.open()
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def open(self) -> None:
        """Greets nodes, and waits until `min_clients` of them can take part."""
        modules, layout = self._server_models()
        # Of the model as it is built, before a checkpoint is loaded into it: so nodes build it too.
        self.roster.open(Identity(layout_digest(layout), frozen_digest(modules[0])))
        self.roster.wait_for(self.min_clients)

    def evaluate_clients(self) -> dict[str, float]:
        """
        Has the nodes test the model on their clients' own test rows, of which they tell the number and how many are
        right. The clients' accuracies become `client_table` and `_client_metrics.csv` in `args.output_dir`.

        Returns:
            `dict[str, float]`: `clients_accuracy` (the mean, weighted by test rows), `clients_bottom_decile`,
            `clients_worst` and `clients_tested`, how many have answered.

        Raises:
            ValueError: When nodes hold no rows out.
            RuntimeError: When no node answers.
        """
        if not self.client_test_share:
            raise ValueError("`client_test_share` is 0, so that nodes hold no rows out: give a share, 0.2.")
        found = ask_for_tests(self.roster, self.model, self.round_timeout)
        if not found:
            raise RuntimeError(f"No node has tested the model in `round_timeout` = {self.round_timeout:g} s.")
        sizes, unknown = self.roster.sizes_M, float("nan")  # counts say nothing of F1 and AUC
        self.client_table = [
            ClientScore(
                client, self.client_name(client), False, int(sizes[client]), size, correct / size, unknown, unknown
            )
            for client, (size, correct) in sorted(found.items())
        ]
        write_client_table(self.client_table, self._output_dir / CLIENT_TABLE_NAME)
        summary = summarise_clients(self.client_table)
        metrics = {f"clients_{name}": summary[name] for name in ("accuracy", "bottom_decile", "worst")}
        metrics["clients_tested"] = len(found)
        self.log(dict(metrics))
        return metrics

    def _engine(self, participants: Participants) -> EachItsOwn:
        return MessageEngine(
            participants, self.processes, self.roster, self.round_timeout, self.min_clients, self._oldest_round
        )

    def _oldest_round(self) -> int:
        """The first round that a resumed run could ask for: that after the oldest checkpoint."""
        if self.args.save_strategy == "no" or self.args.save_only_model:
            return self.state.global_step
        checkpoints = numbered_checkpoints(Path(self._output_dir))
        return min((int(folder.name.rpartition("-")[2]) for folder in checkpoints), default=0)
