"""`FederatedTrainer` whose clients are elsewhere."""

import os
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.trainer_utils import TrainOutput

from ..federation import EachItsOwn, Participants
from ..training import FederatedTrainer, FederatedTrainingArguments
from ..training.resuming import numbered_checkpoints
from .link import Link
from .message_engine import MessageEngine
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
        self.min_clients, self.round_timeout = min_clients, round_timeout
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
