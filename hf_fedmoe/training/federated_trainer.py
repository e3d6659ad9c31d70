"""The face that Hugging Face users know: a `Trainer` whose steps are rounds."""

import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate.utils import DynamoBackend
from peft import PeftConfig
from torch.utils.data import Subset
from transformers import (
    BaseImageProcessor,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from ..data import FederatedDataset, ImageCollator, ReservedSet
from ..federation import (
    BatchReader,
    ClientClock,
    ClientStore,
    EachItsOwn,
    Federation,
    LocalTrainer,
    Participants,
    ProcessGroup,
    check_start,
    load_federation,
    make_defence,
    make_filters,
)
from ..models import FedMoEForCausalLM, guard_narrow_convolutions
from ..owners.cards import mixture_card
from ..reporting import training_table, write_model_card
from ..strategies import FedAvg, Server, Strategy
from ..weights import copy_module, make_codec, release
from .adapters import add_adapter, check_adapters
from .checkpointing import Checkpointing
from .checks import check_best_metric, check_parts, check_run
from .client_evaluation import ClientEvaluation
from .client_training import ClientTraining
from .columns import ModelColumns, check_batch_has_labels
from .engine_choice import make_engine, make_gate_fit
from .evaluated_rows import EvaluatedRows
from .example_budget import make_budget
from .federated_arguments import FederatedTrainingArguments
from .honoured import check_hooks, check_init_arguments, loss_name
from .known_rows import trial_on_known_rows
from .label_names import settle_label_names
from .metrics import OF_CLASSES, OF_EVALUATION, classification_metrics, first_logits
from .precision import train_in_float32
from .privacy_budget import NoBudget
from .progress import Watch, one_line_a_round, without_bars_of_files
from .resuming import CLIENTS_FOLDER
from .run_facts import run_facts
from .run_identity import strategy_settings
from .several_processes import SeveralProcesses


logger = logging.get_logger(__name__)


class FederatedTrainer(ClientTraining, ClientEvaluation, EvaluatedRows, Checkpointing, ModelColumns, SeveralProcesses):
    """
    Trains `model` by rounds of a federated method. `train`, `evaluate`, `predict`, `save_model`, `push_to_hub`,
    callbacks, logging, checkpoints and the best model mean what they mean in [`~transformers.Trainer`], with rounds in
    the place of steps: `state.global_step` and `state.epoch` count rounds.

    Args:
        model ([`~transformers.PreTrainedModel`] or `PeftModel`):
            The server model: for FedAvg the clients' classifier, for Fed-MoE a mixture of such classifiers. Of a
            `PeftModel`, and of a mixture of adapters, clients train and send adapters and heads only.
        args ([`FederatedTrainingArguments`]):
            What clients and server do.
        train_dataset ([`~data.FederatedDataset`]):
            Clients and reserved set, tokenised. Its `label_column` reaches collators as `label`; its names of classes
            go into a `model` that has none, and must not contradict the model's. A language model takes
            [`~data.FederatedTexts`].
        strategy ([`~strategies.Strategy`], *optional*, defaults to [`~strategies.FedAvg`]):
            The federated method.
        eval_dataset (`datasets.Dataset`, *optional*):
            For `evaluate`; `train_dataset.validation` if left out.
        data_collator, processing_class, compute_metrics, callbacks, preprocess_logits_for_metrics (*optional*):
            As in [`~transformers.Trainer`]. `compute_metrics` defaults to accuracy, macro-F1 and AUC, of classes;
            [`~training.evaluate_metrics`] makes one of metrics of `evaluate`. Yours is tried once on made-up scores
            before the first round. With an image processor `data_collator` defaults to [`~data.ImageCollator`].
        peft_config (`peft.PeftConfig`, *optional*):
            Puts an adapter into `model`, as TRL's trainers do. A mixture takes it when it is built.
        compute_loss_func, optimizer_cls_and_kwargs (*optional*):
            As in [`~transformers.Trainer`]: the loss of a client's batch, and the optimizer that each client has anew.
        train_data_collator (`Callable`, *optional*):
            The collator of whatever is trained on, clients' examples and the reserved set, when it is another than
            that of evaluation: one that augments. `data_collator` if left out.
    """

    _where_clients_are = (
        "This is a simulation: all clients are rows of `train_dataset`. For clients on other machines see "
        "docs/deployment.md."
    )

    def __init__(
        self,
        model: PreTrainedModel,
        args: FederatedTrainingArguments,
        train_dataset: FederatedDataset | None = None,
        strategy: Strategy | None = None,
        eval_dataset: datasets.Dataset | dict[str, datasets.Dataset] | None = None,
        data_collator: Callable | None = None,
        processing_class: PreTrainedTokenizerBase | BaseImageProcessor | None = None,
        compute_metrics: Callable | None = classification_metrics,
        callbacks: list[TrainerCallback] | None = None,
        preprocess_logits_for_metrics: Callable | None = None,
        train_data_collator: Callable | None = None,
        peft_config: PeftConfig | None = None,
        compute_loss_func: Callable | None = None,
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        **others: Any,
    ):
        check_init_arguments(others)
        self.strategy = FedAvg() if strategy is None else strategy
        check_parts(model, args, self.strategy)
        if peft_config is not None:
            model = add_adapter(model, peft_config)  # type: ignore[assignment]  # it passes for the model in it
        guard_narrow_convolutions(model)
        self.federated_dataset = train_dataset
        self.rounds = []
        self.never_accepted = {}
        self.client_table = []
        self._contribution_SM: np.ndarray | None = None
        self._active_federation = None
        self._left = None
        self._privacy = NoBudget()
        if isinstance(processing_class, BaseImageProcessor):
            data_collator = data_collator or ImageCollator(processing_class)
        elif data_collator is None:
            data_collator = default_collator(train_dataset, processing_class)
        self.train_data_collator = train_data_collator or data_collator
        if train_dataset is not None:
            train_in_float32(model, args.should_log)
            check_run(model, args, train_dataset, self.strategy, processing_class)
            check_adapters(self.strategy.server_models(model), args)
            self._privacy = make_budget(args, train_dataset.client_sizes.tolist())
            if train_dataset.has_classes:
                settle_label_names(model, train_dataset)
            elif compute_metrics is classification_metrics:
                compute_metrics = None  # of text there is the loss
            if eval_dataset is None:
                eval_dataset = train_dataset.validation
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics or first_logits,
            compute_loss_func=compute_loss_func,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
        )
        one_line_a_round(self.callback_handler, lambda: self.rounds, self.client_name)
        self._watch = Watch(args, self.callback_handler, self.is_world_process_zero())
        # Of `torch_compile`: local training compiles its worker. A mixture that chooses experts by example would be
        # compiled again and again in an evaluation.
        self.accelerator.state.dynamo_plugin.backend = DynamoBackend.NO

    # The run

    def train(
        self, resume_from_checkpoint: str | os.PathLike | bool | None = None, *args: Any, **kwargs: Any
    ) -> TrainOutput:
        """
        Runs the rounds. `resume_from_checkpoint` (a folder, `True` for the newest in `args.output_dir`, or
        `"latest_sound"` for the newest there of which no file is damaged) goes on after the checkpoint's round and
        ends, on CPU, with the same bits as a run that was never interrupted.
        """
        if self.federated_dataset is None:
            raise ValueError("`train_dataset` is None: give the trainer a `FederatedDataset` to train on.")
        check_hooks(self, FederatedTrainer)
        if type(self).evaluate is FederatedTrainer.evaluate and self.compute_metrics in (None, classification_metrics):
            of_classes = () if self.compute_metrics is None or self.args.prediction_loss_only else OF_CLASSES
            named = self.eval_dataset if isinstance(self.eval_dataset, dict) else ()
            check_best_metric(self.args, [*OF_EVALUATION, *of_classes], named)
        if self.federated_dataset.has_classes:
            self._try_metrics()
        logger.info(self._where_clients_are)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _inner_training_loop(
        self,
        batch_size: int | None = None,
        args: TrainingArguments | None = None,
        resume_from_checkpoint: str | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        args = self.args  # which is what it is given
        self.accelerator.free_memory()
        self._start_alike(self._identity)
        rounds = args.rounds
        self._init_training_state(rounds, 1, rounds, resume_from_checkpoint, trial)
        federation = self._tried_federation()
        if resume_from_checkpoint is None:
            self.strategy.setup(federation.server, federation.num_clients)
        else:
            load_federation(Path(resume_from_checkpoint), federation.server, federation.store)
        resumed = None if resume_from_checkpoint is None else Path(resume_from_checkpoint)
        self._privacy.begin(federation, self._output_dir, resumed)
        self._tidy_up(federation.store)
        check_start(self.strategy, federation.server)
        start_time = time.time()
        self._tr_loss, self._total_loss_scalar = torch.tensor(0.0), 0.0
        self._initial_global_step = self._globalstep_last_logged = self.state.global_step
        self._initial_num_input_tokens_seen = self.state.num_input_tokens_seen
        self._active_federation = federation
        self.rounds = []
        try:
            self.control = self.callback_handler.on_train_begin(args, self.state, self.control)
            if args.eval_on_start:
                self._evaluate(trial, ignore_keys_for_eval, skip_scheduler=True)
            for round_index in range(self.state.global_step, rounds):
                if not self._privacy.allows_round():
                    break
                self._run_round(federation, round_index, trial, ignore_keys_for_eval)
                if self.control.should_training_stop:
                    break
            trained = sum(report.num_examples for report in self.rounds) * args.num_train_epochs
            done = max(1, self.state.global_step - self._initial_global_step)
            # What a strategy does last belongs to the result, and to the time that it took.
            if args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
                super()._load_best_model()
            with self._watch.telling():
                federation.finish(rounds)
            federation.store.finish_writing()
            output = self._finalize_training(trial, trained * rounds / done, start_time)
            self._tell_who_was_never_accepted()
            if "contribution_SM" in federation.server.tensors:
                self._contribution_SM = federation.server.tensors["contribution_SM"].cpu().numpy()
        finally:
            federation.local_trainer.close()
            self._left = (federation.server.tensors, federation.server.integers, federation.store)
            # Afterwards the model is an ordinary one again, whose tensors own their memory.
            for module in self.strategy.server_models(self.model):
                release(module)
            self._active_federation = None
            federation.store.close()
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs what may be told; see [`~transformers.Trainer`]."""
        super().log(self._privacy.tellable(logs), start_time)

    def _load_best_model(self) -> None:
        """Nothing where [`~transformers.Trainer`] would: it was loaded before the strategy's last step."""

    def _run_round(
        self, federation: Federation, round_index: int, trial: Any, ignore_keys_for_eval: list[str] | None
    ) -> None:
        args = self.args
        self.control = self.callback_handler.on_epoch_begin(args, self.state, self.control)
        self.control = self.callback_handler.on_step_begin(args, self.state, self.control)
        breakable = self._sigterm.breakable(lambda: federation.settled)
        try:
            with self._watch.clients(args.clients_per_round) as bar, breakable:

                def on_client(client: int) -> None:
                    bar.update()

                report = federation.run_round(round_index, args.clients_per_round, on_client)
        except BaseException:
            if self._sigterm.received and federation.settled:  # broken off while clients trained
                self._save_before_the_end()
            raise
        self.rounds.append(report)
        self.state.global_step = round_index + 1
        federation.settled = True
        self.state.epoch = float(round_index + 1)
        self._tr_loss += report.loss
        self.control = self.callback_handler.on_step_end(args, self.state, self.control)
        self.control = self.callback_handler.on_epoch_end(args, self.state, self.control)
        if self.control.should_log:
            self._total_loss_scalar += self._tr_loss.item()
            self._tr_loss.zero_()
            self._globalstep_last_logged = self.state.global_step
            self.log(
                {
                    "loss": report.loss,
                    **report.metrics,
                    **self._privacy.spent(),
                    "bytes_up": report.bytes_up,
                    "bytes_down": report.bytes_down,
                    "refused_clients": len(report.refused),
                    **{f"seconds_{stage}": seconds for stage, seconds in report.seconds.items()},
                }
            )
        if self.control.should_evaluate:
            metrics = self._evaluate(trial, ignore_keys_for_eval)
            is_best = self._determine_best_metric(metrics=metrics, trial=trial)
            if args.save_strategy == "best":
                self.control.should_save = is_best
        if self.control.should_save:
            with without_bars_of_files():
                self._save_checkpoint(self.model, trial)
            self.control = self.callback_handler.on_save(args, self.state, self.control)
        self._end_on_sigterm()

    # What a run is made of

    def _federation(self) -> Federation:
        args, data = self.args, self._data
        # Evaluating before training may have wrapped `forward` for mixed precision; the worker must not inherit that.
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        modules, layout = self._server_models()
        worker = copy_module(modules[0])
        server = Server(
            self.model,
            worker,
            layout,
            layout.bank(modules),
            [layout.read_integers(module) for module in modules],
            weight_decay=args.weight_decay,
            num_examples=int(data.client_sizes.sum()),
        )
        assert args.client_draw_seed is not None  # the arguments have filled it in
        pool = self._columns_of_clients()
        check_batch_has_labels(pool, self.train_data_collator, data.label_column)
        reserved = None
        if self.strategy.needs_reserved_set() and data.reserved is not None:  # a node of a federation has none
            reserved = ReservedSet(
                self._remove_unused_columns(data.reserved, "reserved"),
                self.data_collator,
                args.eval_batch_size,
                self.accelerator.device,
                self.train_data_collator,
                # fp16 would need a scale of the gradients, which the server's optimizers have not.
                self.accelerator.autocast if self.accelerator.mixed_precision == "bf16" else nullcontext,
                None if loss_name(self) is None else self._objective(),
            )
        local_trainer = LocalTrainer(
            worker,
            layout,
            self.strategy,
            args,
            self.train_data_collator,
            self._make_optimizer(worker),
            self._local_scheduler,
            self.accelerator,
            self._make_optimizer,
            ProcessGroup(self.processes),
            BatchReader(pool, self.train_data_collator, args) if args.dataloader_num_workers else None,
            ClientClock(args.client_timeout),
            self._objective(),
            args.cuda_graphs,
            self._privacy.example_privacy(),
        )
        # Collated when they are asked for, after the trial of what the collators make.
        known_rows = cache(
            lambda: trial_on_known_rows(
                self.strategy, data, self._remove_unused_columns, self.data_collator, self.accelerator
            )
        )
        codec = make_codec(args.upload_compression, args.top_k_share)
        participants = Participants(
            server,
            self.strategy,
            local_trainer,
            # Not `data.client(...)`, which fingerprints its rows: milliseconds for each participant.
            lambda client: Subset(pool, data.client_rows(client).tolist()),
            ClientStore(self._output_dir / CLIENTS_FOLDER),
            reserved,
            args.seed,
            data.client_sizes.tolist(),
            make_filters(server, self.strategy, args.seed, args.client_ranks, args.max_update_norm, codec),
            args.keep_client_optimizer,
            self.client_name,
        )
        return Federation(
            self._engine(participants),
            data.num_clients,
            None if args.is_private and args.noise_source == "system" else args.client_draw_seed,
            args.client_choice,
            sharded=args.client_parallelism == "sums",
            track=self._watch,
            gate_fit=make_gate_fit(args, self.model, self.processes, self.accelerator.mixed_precision),
            computes_finite=lambda model: known_rows()(model),
            defence=make_defence(args.robust_fusion, args.expected_attackers, args.max_update_norm_ratio),
        )

    def _engine(self, participants: Participants) -> EachItsOwn:
        """Makes what trains participants, as the arguments ask."""
        return make_engine(self.args, participants, self.processes)

    # The model card

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
        folder: str | Path | None = None,
        **found: Any,
    ) -> None:
        """
        Writes the model card, see [`~reporting.write_model_card`]; `push_to_hub` calls this with its own `kwargs`.

        Args:
            language, license, tags, model_name (*optional*): As in [`~transformers.Trainer`].
            finetuned_from (`str`, *optional*): Hub id of the model that the experts started from.
            tasks, dataset_args (*optional*): As in [`~transformers.Trainer`], and nothing here: the card tells the
                task by the model.
            dataset_tags (`str`, *optional*): Hub id of the data set.
            dataset (`str`, *optional*): What the data set is called.
            folder (`str` or `Path`, *optional*): Where the card goes, `args.output_dir` if left out.
            found: `comparison` or `gate_share_KC`, for further parts of the card.
        """
        if not self.is_world_process_zero():
            return
        facts = None
        if self.federated_dataset is not None:
            facts = run_facts(
                self.args,
                self.strategy,
                strategy_settings(self.strategy),
                self.federated_dataset,
                self.state,
                self._privacy.tellable_rounds(self.rounds),
                self._contribution_SM,
                self._privacy.facts(),
                self._privacy.example_facts(),
            )
        folder = Path(folder or self._output_dir)
        if isinstance(self.model, FedMoEForCausalLM):
            mixture_card(self.model.config, training_table(facts) if facts else "").save(folder / "README.md")
            return
        write_model_card(
            folder,
            self.model,
            facts,
            model_name=model_name,
            model_id=self.hub_model_id,
            language=language,
            license=license,
            tags=tags or (),
            base_model=finetuned_from,
            dataset=_only_one("dataset", dataset),
            dataset_id=_only_one("dataset_tags", dataset_tags),
            **found,
        )


def default_collator(
    data: FederatedDataset | None, processing_class: PreTrainedTokenizerBase | None
) -> Callable[[list], dict]:
    """Returns what makes batches of rows: it pads texts, and labels where each token has one."""
    if processing_class is None:
        return default_data_collator
    if data is None or data.has_classes:
        return DataCollatorWithPadding(processing_class)
    return DataCollatorForSeq2Seq(processing_class)


def _only_one(name: str, value: str | list[str] | None) -> str | None:
    """Returns a text, or the one in a list; raises `ValueError` for more: a run has one data set."""
    if not isinstance(value, list):
        return value
    if len(value) > 1:
        raise ValueError(f"`{name}` is {value!r}: a card is that of one data set, give one.")
    return value[0] if value else None
