"""Arguments of a federated run: `TrainingArguments` for what a client does, and a few more for the federation."""

import atexit
import os
from dataclasses import dataclass, field

from accelerate import PartialState
from accelerate.utils import str_to_bool

from ..federation import CLIENT_CHOICES, ROBUST_FUSIONS, EngineArguments, leave_group
from ..strategies import check_setting_kinds
from ..weights import COMPRESSIONS, make_codec
from .deepspeed_config import hidden_from_accelerate, requested_config
from .example_arguments import ExamplePrivacyArguments, check_example_arguments
from .privacy_arguments import PrivacyArguments, check_privacy_arguments


LORA_FUSIONS = ("svd", "ffa", "factors")
CLIENT_PARALLELISMS = ("clients", "sums", "data")
NOT_NEGATIVE: tuple[str, ...] = ("weight_decay", "max_grad_norm", "adam_epsilon", "dataloader_num_workers")
NOT_NEGATIVE += ("logging_steps", "eval_steps", "save_steps")


@dataclass
class FederatedTrainingArguments(ExamplePrivacyArguments, PrivacyArguments, EngineArguments):
    """
    [`~transformers.TrainingArguments`] of a federated run.

    What a client does keeps its name: `num_train_epochs` are the local epochs, `per_device_train_batch_size`,
    `learning_rate`, `optim`, `weight_decay`, `lr_scheduler_type`, `gradient_accumulation_steps`, `max_grad_norm`,
    `bf16` and so on are those of local training; `dataloader_num_workers` processes read clients' batches meanwhile,
    the same ones for all. What counts steps counts rounds: `logging_steps`, `eval_steps`, `save_steps`. A round is
    logged and saved by default; the two newest checkpoints are kept (`save_total_limit`). Processes besides the main
    one log what that logs (`log_level_replica`). [`PrivacyArguments`] and [`ExamplePrivacyArguments`] have those of
    differential privacy, and [`FedMoETrainingArguments`] Fed-MoE's besides.

    Args:
        rounds (`int`, *optional*, defaults to 10):
            Rounds of the federation.
        clients_per_round (`int`, *optional*, defaults to 3):
            m, the clients drawn for each round.
        client_draw_seed (`int`, *optional*):
            Seed of the draw of clients; `seed` if left out. Equal seeds give two methods equal participants.
        client_choice (`str`, *optional*, defaults to `"uniform"`):
            How they are drawn: `"uniform"`, without replacement, `"stratified"`, one of each residue class of
            client numbers modulo m, or, in private runs, `"poisson"`, each by itself with probability m / M.
        keep_client_optimizer (`bool`, *optional*, defaults to `False`):
            Whether a client finds its optimizer state again when it is next drawn.
        upload_compression (`str`, *optional*, defaults to `"none"`):
            How uploads travel: `"none"`, `"bf16"`, `"int8"` or `"top_k"`, see [`~weights.make_codec`]. The logged
            `bytes_up` are those of the encoded uploads; the server works with what it reads of them.
        top_k_share (`float`, *optional*, defaults to 0.01):
            Share of the entries of an update that `"top_k"` sends.
        max_update_norm (`float`, *optional*):
            To what norm clients shorten their updates, before they are encoded: no client moves the server further
            than that. As long as they are if left out. By itself this is no differential privacy, which needs noise.
        max_update_norm_ratio (`float`, *optional*):
            To what multiple of the median of a round's norms the server shortens updates, at least 1. Not at all if
            left out.
        robust_fusion (`str`, *optional*):
            By what models are fused in the place of their mean, so that a few hostile ones cannot move it far:
            `"median"` and `"trimmed_mean"` of each entry, `"geometric_median"`, or the mean of those that `"krum"` (of
            the one) or `"multi_krum"` keeps. docs/trust.md says which holds against what. The mean if left out.
        expected_attackers (`float`, *optional*, defaults to 0.2):
            Share of a round's participants that may be hostile, below a half: as much of the weight leaves
            `"trimmed_mean"` out at either end, so many clients leaves `"multi_krum"` out.
        lora_fusion (`str`, *optional*, defaults to `"svd"`):
            How LoRA adapters are fused: `"svd"` (their products exactly, then cut to their rank by the best
            approximation there is), `"ffa"` (A stays as it starts, common to all, and only B is trained and sent:
            exact, half the bytes; FFA-LoRA, Sun et al. 2024) or `"factors"` (A and B each by itself: FedIT, Zhang et
            al. 2024, a baseline, since that is not the average of the adapters).
        client_ranks (`list[int]`, *optional*):
            Ranks of the clients' LoRA adapters, over and over: `[8, 4]` gives even clients 8. The server's own rank if
            left out, and the largest there can be. Only with `lora_fusion="svd"`.
        lr_scheduler_scope (`str`, *optional*, defaults to `"round"`):
            What `lr_scheduler_type` stretches over: `"round"` (a client's local steps, as in a plain `Trainer` run of
            them) or `"run"` (the rounds; constant within each).
        client_parallelism (`str`, *optional*):
            What several processes (`accelerate launch`, `torchrun`) share out: `"clients"` (each trains other clients
            of a round and sends the server every upload; on CPUs of one kind a run ends with the bits of one process),
            `"sums"` (the same, but each adds its uploads up as they come, so that memory does not grow with
            `clients_per_round`, in one process too: for methods that only average; with Fed-MoE each process keeps
            those of its own clients, and no one has all) or `"data"` (all train each client together, on shares of
            its batches, whose size stays that of one process). The last two end like `"clients"` but for rounding.
            `"data"` with `deepspeed`, or where the launcher asks for that, and `"clients"` otherwise if left out.
        clients_at_once (`int`, *optional*, defaults to 1):
            How many clients a process trains at once, as one model of stacked weights (`torch.vmap`): for small
            models and adapters. It takes the memory of that many models with their gradients and optimizer states.
            With a constant learning rate any clients are taken together, otherwise those with equally many steps. A
            run ends like one by one but for rounding, dropout and augmentation.
        cuda_graphs (`bool`, *optional*, defaults to `True`):
            Whether a GPU replays a client's forward and backward passes as CUDA graphs: batches of shapes that come
            again, trained by the model's own loss. Each graph is compared with the plain pass before it is used. A
            graph takes the memory of one pass, all graphs of a run together that of the largest.
        client_timeout (`float`, *optional*):
            Seconds that a client's training may take in a round; one that takes longer, because it is slow or hangs,
            is refused, and the round goes on. As long as it likes if left out or 0.
    """

    rounds: int = field(default=10, metadata={"help": "Rounds of the federation."})
    clients_per_round: int = field(default=3, metadata={"help": "m, the clients drawn for each round."})
    client_draw_seed: int | None = field(default=None, metadata={"help": "Seed of the draw of clients (seed)."})
    client_choice: str = field(default="uniform", metadata={"help": f"One of {', '.join(CLIENT_CHOICES)}."})
    keep_client_optimizer: bool = field(default=False, metadata={"help": "Each client keeps its optimizer state."})
    upload_compression: str = field(default="none", metadata={"help": f"One of {', '.join(COMPRESSIONS)}."})
    top_k_share: float = field(default=0.01, metadata={"help": "Share of an update that top_k sends."})
    max_update_norm: float | None = field(default=None, metadata={"help": "Norm to which updates are shortened."})
    max_update_norm_ratio: float | None = field(
        default=None, metadata={"help": "Multiple of the median norm to which the server shortens updates."}
    )
    robust_fusion: str | None = field(default=None, metadata={"help": f"One of {', '.join(ROBUST_FUSIONS)} (mean)."})
    expected_attackers: float = field(
        default=0.2, metadata={"help": "Share of participants that may be hostile, for robust_fusion."}
    )
    lora_fusion: str = field(default="svd", metadata={"help": f"One of {', '.join(LORA_FUSIONS)}."})
    client_ranks: list[int] | None = field(default=None, metadata={"help": "Ranks of clients' adapters, in turn."})
    lr_scheduler_scope: str = field(default="round", metadata={"help": "What the schedule spans: round or run."})
    client_parallelism: str | None = field(
        default=None, metadata={"help": "What processes share: clients, sums, data."}
    )
    clients_at_once: int = field(default=1, metadata={"help": "How many clients a process trains at once."})
    cuda_graphs: bool = field(default=True, metadata={"help": "Replay passes of clients as CUDA graphs on a GPU."})
    client_timeout: float | None = field(
        default=None, metadata={"help": "Seconds after which a client that still trains is refused (none)."}
    )
    log_level_replica: str = field(
        default="passive", metadata={"help": "Log level of the processes besides the main one (that of the main one)."}
    )
    num_train_epochs: float = field(default=1.0, metadata={"help": "Local epochs of a client in a round."})
    logging_steps: float = field(default=1, metadata={"help": "Log every so many rounds."})
    save_steps: float = field(default=1, metadata={"help": "Save a checkpoint every so many rounds."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep; the best one besides."})

    def __post_init__(self) -> None:
        check_setting_kinds(self)
        config, self.deepspeed = requested_config(self.deepspeed), None
        with hidden_from_accelerate():
            if self.use_cpu or str_to_bool(os.environ.get("ACCELERATE_USE_CPU", "false")):
                # `TrainingArguments` starts the process group of GPUs with `ddp_timeout`, and that of CPUs without.
                PartialState(cpu=True, backend=self.ddp_backend, timeout=self.ddp_timeout_delta)
            super().__post_init__()
            device = self.device  # this starts the process group
        if device.type == "cpu":
            atexit.register(leave_group)
            self.dataloader_pin_memory = False  # as `use_cpu` says; PyTorch warns of what has no accelerator
        self.deepspeed = config
        sizes = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
        for name in ("rounds", "clients_per_round", "clients_at_once", *sizes):
            if vars(self)[name] < 1:
                raise ValueError(f"`{name}` is {vars(self)[name]}: give at least 1.")
        for name in NOT_NEGATIVE:
            if (vars(self)[name] or 0) < 0:
                raise ValueError(f"`{name}` is {vars(self)[name]}: give 0 or more.")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= vars(self)[name] < 1:
                raise ValueError(f"`{name}` is {vars(self)[name]}: give a number in [0, 1).")
        if self.adam_epsilon <= 0:
            # A weight that no example reaches, a word that none has, would be 0 / 0.
            raise ValueError(f"`adam_epsilon` is {self.adam_epsilon}: give more than 0, 1e-8 for example.")
        for name in ("seed", "data_seed", "client_draw_seed"):
            if not 0 <= (vars(self)[name] or 0) < 2**32:
                raise ValueError(f"`{name}` is {vars(self)[name]}: give a whole number from 0 to {2**32 - 1}.")
        if self.optim_args and not all(part.count("=") == 1 for part in self.optim_args.split(",")):
            raise ValueError(f"`optim_args` is {self.optim_args!r}: write name=value,name=value.")
        if self.client_choice not in CLIENT_CHOICES:
            raise ValueError(
                f"`client_choice` is {self.client_choice!r}: choose one of {', '.join(map(repr, CLIENT_CHOICES))}."
            )
        if self.lr_scheduler_scope not in ("round", "run"):
            raise ValueError(f'`lr_scheduler_scope` is {self.lr_scheduler_scope!r}: choose "round" or "run".')
        if self.client_parallelism is None:
            self.client_parallelism = "data" if config else "clients"
        if config and self.client_parallelism != "data":
            raise ValueError(
                f"`client_parallelism` is {self.client_parallelism!r}, but DeepSpeed shares each client out over the "
                'processes: choose "data", or leave it out.'
            )
        if self.client_parallelism not in CLIENT_PARALLELISMS:
            raise ValueError(
                f'`client_parallelism` is {self.client_parallelism!r}: choose "clients", "sums" or "data".'
            )
        if self.client_timeout:
            self._check_client_timeout(self.client_timeout)
        make_codec(self.upload_compression, self.top_k_share)
        if self.max_update_norm is not None and not self.max_update_norm > 0:
            raise ValueError(f"`max_update_norm` is {self.max_update_norm}: give a norm above 0, or leave it out.")
        self._check_defence()
        check_privacy_arguments(self, self.client_choice, self.clients_per_round)
        check_example_arguments(self)
        if self.lora_fusion not in LORA_FUSIONS:
            raise ValueError(
                f"`lora_fusion` is {self.lora_fusion!r}: choose one of {', '.join(map(repr, LORA_FUSIONS))}."
            )
        if self.client_ranks is not None:
            self._check_client_ranks()
        if self.max_steps > 0:
            raise ValueError(
                f"`max_steps` is {self.max_steps}, which a federated run does not use: set `rounds` for its length, "
                "`num_train_epochs` for the local epochs of a client."
            )
        if self.num_train_epochs <= 0:
            raise ValueError(f"`num_train_epochs` is {self.num_train_epochs}: clients need more than 0 local epochs.")
        if self.client_draw_seed is None:
            self.client_draw_seed = self.seed

    def _check_client_timeout(self, timeout: float) -> None:
        begin = f"`client_timeout` is {timeout:g}"
        if timeout < 0:
            raise ValueError(f"{begin}: give seconds, or 0 for as long as it takes.")
        if self.client_parallelism == "data":
            raise ValueError(
                f"{begin}, but with `client_parallelism` = 'data' all processes train each client together, and none "
                'can leave it: choose "clients", or leave `client_timeout` out.'
            )
        if self.world_size > 1 and timeout >= self.ddp_timeout:
            raise ValueError(
                f"{begin}, but the other processes wait `ddp_timeout` = {self.ddp_timeout} s for one that trains: "
                "raise that, or lower `client_timeout`."
            )

    def _check_defence(self) -> None:
        ratio, share, names = self.max_update_norm_ratio, self.expected_attackers, ", ".join(map(repr, ROBUST_FUSIONS))
        if ratio is not None and not 1 <= ratio < float("inf"):
            raise ValueError(f"`max_update_norm_ratio` is {ratio}: give 1 or more, or leave it out.")
        if self.robust_fusion is not None and self.robust_fusion not in ROBUST_FUSIONS:
            raise ValueError(f"`robust_fusion` is {self.robust_fusion!r}: choose one of {names}, or leave it out.")
        if not 0 <= share < 0.5:
            raise ValueError(f"`expected_attackers` is {share}: give a share of 0 or more, below a half.")
        for name in ("robust_fusion", "max_update_norm_ratio") if self.is_private else ():
            if vars(self)[name] is not None:
                raise ValueError(
                    f"`{name}` is {vars(self)[name]!r} in a private run, where what becomes of an update must not "
                    "depend on the others: one client would move more than the noise hides. Leave it out; "
                    "`clipping_norm` bounds hostile updates, too."
                )

    def _check_client_ranks(self) -> None:
        if not self.client_ranks or min(self.client_ranks) < 1:
            raise ValueError(f"`client_ranks` is {self.client_ranks}: give ranks of at least 1, or leave it out.")
        if self.lora_fusion != "svd":
            raise ValueError(
                f"`client_ranks` is {self.client_ranks}, but `lora_fusion` is {self.lora_fusion!r}, which needs one "
                "rank for all clients: take 'svd', or leave `client_ranks` out."
            )
        # An update is what is left of what was received, which a client of a smaller rank has not received whole.
        without_others = ("max_update_norm", None), ("max_update_norm_ratio", None), ("robust_fusion", None)
        for name, without in (("upload_compression", "none"), *without_others):
            if vars(self)[name] == without:
                continue
            raise ValueError(
                f"`client_ranks` is {self.client_ranks} and `{name}` is {vars(self)[name]!r}: only one of them at a "
                "time, leave the other out."
            )
