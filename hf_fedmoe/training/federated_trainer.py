"""The face that Hugging Face users know: a `Trainer` whose steps are rounds."""

import inspect
import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate.utils import DynamoBackend
from peft import PeftConfig, PeftModel
from torch import nn
from torch.utils.data import Subset
from tqdm.auto import tqdm
from transformers import (
    BaseImageProcessor,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    default_data_collator,
    get_scheduler,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, get_last_checkpoint, rotate_checkpoints

from ..data import FederatedDataset, ImageCollator, ReservedSet
from ..federation import (
    BatchReader,
    ClientStore,
    Federation,
    LocalTrainer,
    RoundReport,
    StackedTrainer,
    Stream,
    Team,
    ZeroGateFit,
    ZeroTrainer,
    atomic_directory,
    check_identity,
    load_federation,
    read_manifest,
    save_federation,
    scale_learning_rates,
    seed_of,
    take_step,
)
from ..models import AdapterExpert, FedMoEPreTrainedModel
from ..models.modeling_adapted import save_base_configs
from ..reporting import ClientScore, write_model_card
from ..strategies import FedAvg, GateFit, Server, Strategy
from ..weights import StateLayout, copy_module, make_codec, release
from .adapters import add_adapter, base_fingerprint, check_adapters, freeze_lora_a
from .checks import check_images, check_run
from .client_evaluation import ClientEvaluation
from .deepspeed_config import engine_config
from .federated_arguments import FederatedTrainingArguments
from .metrics import classification_metrics
from .run_facts import run_facts
from .run_identity import run_identity
from .several_processes import SeveralProcesses


# The underscore keeps it from the Hub: `push_to_hub` leaves out `_*`, and clients' own models belong to nobody else.
CLIENTS_FOLDER = "_clients"


class FederatedTrainer(ClientEvaluation, SeveralProcesses, Trainer):
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
            Clients and reserved set, tokenised.
        strategy ([`~strategies.Strategy`], *optional*, defaults to [`~strategies.FedAvg`]):
            The federated method.
        eval_dataset (`datasets.Dataset`, *optional*):
            For `evaluate`; `train_dataset.validation` if left out.
        data_collator, processing_class, compute_metrics, callbacks, preprocess_logits_for_metrics (*optional*):
            As in [`~transformers.Trainer`]. `compute_metrics` defaults to accuracy, macro-F1 and AUC; with an
            image processor `data_collator` defaults to [`~data.ImageCollator`].
        peft_config (`peft.PeftConfig`, *optional*):
            Puts an adapter into `model`, as TRL's trainers do. A mixture takes it when it is built.
        train_data_collator (`Callable`, *optional*):
            The collator of whatever is trained on, clients' examples and the reserved set, when it is another than
            that of evaluation: one that augments. `data_collator` if left out.
    """

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
    ):
        self.strategy = strategy or FedAvg()
        if peft_config is not None:
            model = add_adapter(model, peft_config)
        self.federated_dataset = train_dataset
        self.rounds: list[RoundReport] = []
        self.client_table: list[ClientScore] = []
        self._contribution_SM: np.ndarray | None = None
        self._active_federation: Federation | None = None
        # Of the last round: the strategy's tensors, the integer buffers, the manifest of the client store.
        self._left: tuple[dict, list[dict], dict[int, str]] | None = None
        if isinstance(processing_class, BaseImageProcessor):
            data_collator = data_collator or ImageCollator(processing_class)
        elif data_collator is None:
            data_collator = DataCollatorWithPadding(processing_class) if processing_class else default_data_collator
        self.train_data_collator = train_data_collator or data_collator
        if train_dataset is not None:
            check_run(model, args, train_dataset, self.strategy, processing_class)
            check_adapters(self.strategy.server_models(model), args)
            check_images(self.strategy.server_models(model)[0], train_dataset, self.train_data_collator)
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
            preprocess_logits_for_metrics=preprocess_logits_for_metrics or _first_logits,
        )
        # Of `torch_compile`: local training compiles its worker. A mixture that chooses experts by example would be
        # compiled again and again in an evaluation.
        self.accelerator.state.dynamo_plugin.backend = DynamoBackend.NO

    # The run

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """
        Runs the rounds. `resume_from_checkpoint` (a folder, or `True` for the newest in `args.output_dir`) goes on
        after the checkpoint's round and ends, on CPU, with the same bits as a run that was never interrupted.
        """
        if self.federated_dataset is None:
            raise ValueError("`train_dataset` is None: give the trainer a `FederatedDataset` to train on.")
        if resume_from_checkpoint is True:
            resume_from_checkpoint = get_last_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(f"`output_dir` {self.args.output_dir!r} holds no checkpoint to resume from.")
        replaces = self.args.save_strategy != "no" and not self.rounds and Path(self.args.output_dir).is_dir()
        if not resume_from_checkpoint and replaces and get_last_checkpoint(self.args.output_dir):
            raise ValueError(
                f"`output_dir` {self.args.output_dir!r} holds the checkpoints of an earlier run, which this one would "
                "replace: continue it, `train(resume_from_checkpoint=True)`, or choose another `output_dir`."
            )
        if resume_from_checkpoint:
            check_identity(Path(resume_from_checkpoint), self._identity())
        return super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)

    def _inner_training_loop(
        self, batch_size=None, args=None, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None
    ) -> TrainOutput:
        self.accelerator.free_memory()
        self._start_alike()
        rounds = args.rounds
        self._init_training_state(rounds, 1, rounds, resume_from_checkpoint, trial)
        federation = self._federation()
        if resume_from_checkpoint is None:
            self.strategy.setup(federation.server, federation.num_clients)
        else:
            load_federation(Path(resume_from_checkpoint), federation.server, federation.store)
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
                self._run_round(federation, round_index, trial, ignore_keys_for_eval)
                if self.control.should_training_stop:
                    break
            trained = sum(report.num_examples for report in self.rounds) * args.num_train_epochs
            done = max(1, self.state.global_step - self._initial_global_step)
            output = self._finalize_training(trial, trained * rounds / done, start_time)
            # After the best model was loaded, if that was asked for: what a strategy does last belongs to the result.
            seed = seed_of(args.seed, Stream.SERVER, rounds)
            server, reserved = federation.server, federation.reserved
            take_step(lambda: self.strategy.finish(server, reserved, seed), server, reserved, self.processes)
            if "contribution_SM" in federation.server.tensors:
                self._contribution_SM = federation.server.tensors["contribution_SM"].cpu().numpy()
        finally:
            self._left = (federation.server.tensors, federation.server.integers, federation.store.manifest)
            # Afterwards the model is an ordinary one again, whose tensors own their memory.
            for module in self.strategy.server_models(self.model):
                release(module)
            self._active_federation = None
        return output

    def _run_round(
        self, federation: Federation, round_index: int, trial: Any, ignore_keys_for_eval: list[str] | None
    ) -> None:
        args = self.args
        self.control = self.callback_handler.on_epoch_begin(args, self.state, self.control)
        self.control = self.callback_handler.on_step_begin(args, self.state, self.control)
        hidden = args.disable_tqdm or not self.is_world_process_zero()
        with tqdm(total=args.clients_per_round, desc="Clients", leave=False, disable=hidden) as bar:
            report = federation.run_round(round_index, args.clients_per_round, lambda client: bar.update())
        self.rounds.append(report)
        self.state.global_step = round_index + 1
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
            self._save_checkpoint(self.model, trial)
            self.control = self.callback_handler.on_save(args, self.state, self.control)

    # What a run is made of

    def _federation(self) -> Federation:
        args, data = self.args, self.federated_dataset
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
        pool = self._columns_of_clients()
        reserved = None
        if self.strategy.needs_reserved_set():
            reserved = ReservedSet(
                self._remove_unused_columns(data.reserved, "reserved"),
                self.data_collator,
                args.eval_batch_size,
                self.accelerator.device,
                self.train_data_collator,
                # fp16 would need a scale of the gradients, which the server's optimizers have not.
                self.accelerator.autocast if self.accelerator.mixed_precision == "bf16" else nullcontext,
            )
        make_trainer = LocalTrainer
        if args.client_parallelism == "data" and isinstance(self.model, FedMoEPreTrainedModel):
            server.gate_fit = GateFit(self.model, self.processes)
        if args.deepspeed:
            config = engine_config(args.deepspeed, args, self.accelerator.mixed_precision)
            make_trainer = partial(ZeroTrainer, config=config)
            if server.gate_fit is not None and self.model.config.gate == "model":
                server.gate_fit = ZeroGateFit(self.model, self.processes, config)
        elif args.clients_at_once > 1:
            constant_rate = args.lr_scheduler_type == "constant" or args.lr_scheduler_scope == "run"
            make_trainer = partial(StackedTrainer, at_once=args.clients_at_once, constant_rate=constant_rate)
        local_trainer = make_trainer(
            worker,
            layout,
            self.strategy,
            args,
            self.train_data_collator,
            self._make_optimizer(worker),
            self._local_scheduler,
            self.accelerator,
            self._make_optimizer,
            Team(self.processes),
            BatchReader(pool, self.train_data_collator, args) if args.dataloader_num_workers else None,
        )
        if isinstance(local_trainer, StackedTrainer):
            local_trainer.try_out(pool)
        store = ClientStore(Path(args.output_dir, CLIENTS_FOLDER))
        return Federation(
            server,
            self.strategy,
            local_trainer,
            data.num_clients,
            # Not `data.client(...)`, which fingerprints its rows: milliseconds for each participant.
            lambda client: Subset(pool, data.client_rows(client).tolist()),
            store,
            reserved,
            args.seed,
            args.client_draw_seed,
            args.keep_client_optimizer,
            args.client_choice,
            make_codec(args.upload_compression, args.top_k_share),
            args.client_ranks,
            client_sizes=data.client_sizes.tolist(),
            processes=self.processes,
            parallelism=args.client_parallelism,
        )

    def _server_models(self) -> tuple[list[nn.Module], StateLayout]:
        """What becomes the rows of the server, and their layout."""
        modules = self.strategy.server_models(self.model)
        if self.args.lora_fusion == "ffa":
            freeze_lora_a(modules)
        return modules, StateLayout.of(modules[0], lora_products=self.args.lora_fusion == "svd")

    def _columns_of_clients(self) -> datasets.Dataset:
        """The pool without the columns that the client model does not take."""
        self._set_signature_columns_if_needed()
        return self._remove_unused_columns(self.federated_dataset.pool, "client")

    def _make_optimizer(self, worker: nn.Module) -> torch.optim.Optimizer:
        self.optimizer = None
        optimizer = self.create_optimizer(worker)
        scale_learning_rates(optimizer, worker, self.strategy.learning_rate_factors(worker))
        return self.accelerator.prepare_optimizer(optimizer, device_placement=False)

    def _local_scheduler(self, optimizer: torch.optim.Optimizer, num_steps: int) -> Any:
        """The learning-rate schedule of one client's local steps in the current round."""
        args = self.args
        length = num_steps if args.lr_scheduler_scope == "round" else args.rounds
        scheduler = get_scheduler(
            args.lr_scheduler_type, optimizer, args.get_warmup_steps(length), length, args.lr_scheduler_kwargs
        )
        if args.lr_scheduler_scope == "run":
            # After the run, what clients train to be evaluated has the rate of the last round.
            round_index = min(self.state.global_step, args.rounds - 1)
            factors = [function(round_index) for function in scheduler.lr_lambdas]
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda step, f=f: f for f in factors])
        return scheduler

    def _set_signature_columns_if_needed(self) -> None:
        """The columns that the *client* model takes; a mixture passes them on."""
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            expert = self.strategy.server_models(self.model)[0]
            if expert is not self.model:
                client_model = expert.base if isinstance(expert, AdapterExpert) else expert
                self._signature_columns += list(inspect.signature(client_model.forward).parameters)

    # Checkpoints

    @cached_property
    def _base_fingerprint(self) -> int | None:
        return base_fingerprint(self.strategy.server_models(self.model)[0])

    def _identity(self) -> dict[str, Any]:
        """What two runs must have in common for one to resume the other."""
        modules, layout = self._server_models()
        return run_identity(
            self.args, self.strategy, layout, len(modules), self._base_fingerprint, self.federated_dataset
        )

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """A whole checkpoint or none: written beside its place, synced, renamed."""
        run_dir = Path(self._get_output_dir(trial=trial))
        target = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.state.best_global_step:
            best = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
            if best.exists() or best == target:
                self.state.best_model_checkpoint = str(best)
        self.processes.on_main(lambda: self._write_checkpoint(run_dir, target))

    def _write_checkpoint(self, run_dir: Path, target: Path) -> None:
        self._active_federation.store.sync()
        with atomic_directory(target) as folder:
            self._save(str(folder))
            for callback in [*self.callback_handler.callbacks, self.control]:
                if isinstance(callback, ExportableState):
                    self.state.stateful_callbacks[type(callback).__name__] = callback.state()
            self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
            if not self.args.save_only_model:
                federation = self._active_federation
                save_federation(folder, federation.server, federation.store, self._identity())
        if self.args.push_to_hub and self.args.hub_strategy != "end":
            # Trainer's own push of a checkpoint would write a pickle and leave out code and card.
            self.push_to_hub(f"Round {self.state.global_step}", blocking=False)
        rotate_checkpoints(
            output_dir=str(run_dir),
            save_total_limit=self.args.save_total_limit,
            best_model_checkpoint=self.state.best_model_checkpoint,
            use_mtime=True,
        )
        checkpoints = run_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        self._active_federation.store.prune([read_manifest(folder) for folder in checkpoints])

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """The model and its processor; the arguments as JSON, where `Trainer` writes a pickle."""
        if not self.args.should_save:
            return
        output_dir = Path(output_dir or self.args.output_dir)
        output_dir.mkdir(parents=True, exist_ok=True)
        self.model.save_pretrained(output_dir, state_dict=state_dict)
        if isinstance(self.model, PeftModel):
            save_base_configs(self.model, output_dir)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(output_dir)
        (output_dir / "training_args.json").write_text(json.dumps(self.args.to_dict(), indent=2, default=str) + "\n")

    # The model card

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        dataset_tags: str | None = None,
        dataset: str | None = None,
        folder: str | Path | None = None,
        **found: Any,
    ) -> None:
        """
        Writes the model card, see [`~reporting.write_model_card`]; `push_to_hub` calls this with its own `kwargs`.

        Args:
            language, license, tags, model_name (*optional*): As in [`~transformers.Trainer`].
            finetuned_from (`str`, *optional*): Hub id of the model that the experts started from.
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
                self._identity()["strategy_settings"],
                self.federated_dataset,
                self.state,
                self.rounds,
                self._contribution_SM,
            )
        write_model_card(
            folder or self.args.output_dir,
            self.model,
            facts,
            model_name=model_name,
            model_id=self.hub_model_id,
            language=language,
            license=license,
            tags=tags or (),
            base_model=finetuned_from,
            dataset=dataset,
            dataset_id=dataset_tags,
            **found,
        )


def _first_logits(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    """Of a model's outputs only the logits are gathered: gate and expert outputs would fill memory for nothing."""
    return logits[0] if isinstance(logits, tuple) else logits
