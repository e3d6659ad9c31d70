"""An owner alone: from text to an expert of a common base, its sums and its card, in one folder."""

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.pytorch_utils import Conv1D
from transformers.trainer_callback import PrinterCallback

from ..models import FedMoECausalConfig, TextStatistics, base_sha256, text_statistics
from ..models.configuration_checks import check_integer
from ..models.configuration_fedmoe_causal import owners_as_dicts
from ..models.lora_fedmoe_causal import find_targets
from ..models.router_fedmoe_causal import PREFIXES
from ..weights import all_finite
from .cards import expert_card
from .privacy import private_statistics
from .texts import read_rows


STATISTICS_FILE = "statistics.safetensors"
# As many sequences as the router gains by, taken from the whole text.
STATISTICS_SEQUENCES = 1000


@dataclass(frozen=True)
class ExpertFacts:
    """
    Facts about an expert, which its card has.

    Args:
        name (`str`): Of the owner.
        licence (`str`, *optional*): Under which the owner gives the expert away.
        tokens (`int`): Of the text, those that were left over not counted.
        base (`str`): Name of the base.
        base_sha256 (`str`): Of the base's weights, from [`base_sha256`].
        sequence_length (`int`): Tokens of a sequence in training.
        steps (`int`): Steps of training.
        learning_rate (`float`): Of training, at its highest.
        seed (`int`): Of the adapter's start and of the order of the sequences.
        loss (`float`): Mean over training.
        epsilon (`float`, *optional*), delta (`float`, *optional*): Of the privacy of the statistics.
    """

    name: str
    licence: str | None
    tokens: int
    base: str
    base_sha256: str
    sequence_length: int
    steps: int
    learning_rate: float
    seed: int
    loss: float
    epsilon: float | None = None
    delta: float | None = None

    def about_the_owner(self) -> dict[str, Any]:
        """Returns what a mixture's configuration says of the owner."""
        return {name: asdict(self)[name] for name in ("name", "licence", "tokens") if asdict(self)[name] is not None}


def default_arguments(out: str | os.PathLike, **settings: Any) -> TrainingArguments:
    """
    Makes the arguments of an expert's training.

    Args:
        out (`str` or `os.PathLike`): The expert's folder.
        settings: Any fields of `TrainingArguments`, which go before the defaults here.
    """
    quiet: dict[str, Any] = {"report_to": "none", "save_strategy": "no", "logging_strategy": "no"}
    local = {"learning_rate": 1e-3, "num_train_epochs": 1, "label_names": ["labels"]}
    return TrainingArguments(output_dir=str(out), **quiet | local | settings)


def new_adapter(
    base: PreTrainedModel,
    lora_rank: int = 32,
    lora_alpha: float = 64,
    target_modules: list[str] | None = None,
    seed: int = 0,
) -> PeftModel:
    """
    Puts a LoRA adapter that changes nothing yet beside a base, which is frozen.

    Args:
        base (`PreTrainedModel`): A causal language model.
        lora_rank (`int`, *optional*, defaults to 32): Rank.
        lora_alpha (`float`, *optional*, defaults to 64): The update is `lora_alpha / lora_rank * B A`.
        target_modules (`list[str]`, *optional*): Names of layers, or ends of names; the feed-forward ones if left out.
        seed (`int`, *optional*, defaults to 0): Of its start.

    Raises:
        `ValueError`: If a value is out of its range, or the base has no such layers.
    """
    FedMoECausalConfig(
        base_config=base.config, lora_rank=lora_rank, lora_alpha=lora_alpha, target_modules=target_modules
    )
    targets = find_targets(base, target_modules)
    set_seed(seed)
    scale: Any = lora_alpha  # PEFT takes fractions too
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora_rank,
        lora_alpha=scale,
        target_modules=list(targets),
        fan_in_fan_out=all(isinstance(layer, Conv1D) for layer in targets.values()),
    )
    return get_peft_model(base, config)


def fit_adapter(
    model: PeftModel,
    rows: Sequence[dict[str, list[int]]],
    args: TrainingArguments,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> float:
    """
    Trains an adapter by the Trainer of transformers; on one CPU thread twice to the same bits.

    Args:
        model (`PeftModel`): From [`new_adapter`]; changed.
        rows (`Sequence[dict[str, list[int]]]`): With `input_ids` and `labels`, from [`read_rows`].
        args (`TrainingArguments`): Of the Trainer.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): Pads rows of different lengths, which then need one.

    Returns:
        `float`: The mean loss.

    Raises:
        `ValueError`: If the loss is not finite.
    """
    collate = None if tokenizer is None else DataCollatorForSeq2Seq(tokenizer)
    trainer = Trainer(model, args, collate, train_dataset=rows)
    if args.logging_strategy == "no":
        trainer.remove_callback(PrinterCallback)
    loss = trainer.train().training_loss
    if not math.isfinite(loss):
        raise ValueError(f"`learning_rate` is {args.learning_rate}, with which the loss became {loss}: lower it.")
    # The loss is that of before the last step.
    if not all_finite(parameter for parameter in model.parameters() if parameter.requires_grad):
        raise ValueError(f"`learning_rate` is {args.learning_rate}, with which weights became infinite: lower it.")
    return loss


def sums_of(
    base: PreTrainedModel, sequences: Sequence[list[int]], epsilon: float | None = None, delta: float = 1e-5
) -> TextStatistics:
    """
    Sums up a text for the router, with the hash of the base.

    Args:
        base (`PreTrainedModel`): Without an adapter in it.
        sequences (`Sequence[list[int]]`): Token ids.
        epsilon (`float`, *optional*), delta (`float`, *optional*, defaults to 1e-5):
            With an epsilon the sums are private for each sequence, see [`private_statistics`].
    """
    chosen = sequences[:: math.ceil(len(sequences) / STATISTICS_SEQUENCES)]
    if epsilon is None:
        return text_statistics(base.get_input_embeddings(), chosen, base_sha256=base_sha256(base))
    return private_statistics(base, chosen, epsilon, delta, base_sha256(base))


def load_base(name: str | os.PathLike) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    Loads a base and its tokenizer.

    Args:
        name (`str` or `os.PathLike`): A folder or a name on the Hub; safetensors only.

    Raises:
        `OSError`: If there is no such base, or it is none; names it.
    """
    try:
        return AutoModelForCausalLM.from_pretrained(name, use_safetensors=True), AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:  # the latter of a name that cannot be, or a folder without a model's type
        raise OSError(
            f"`base` is {str(name)!r}, which cannot be loaded: name a folder with a model and its tokenizer, or a "
            f"name on the Hub while there is a network. It says: {error}"
        ) from error


def check_length(base: PreTrainedModel, sequence_length: int) -> None:
    """Raises a `ValueError` if a base cannot read so many tokens, or a sequence is too short for the router."""
    longest = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    check_integer("sequence_length", sequence_length, PREFIXES[0])
    if longest and sequence_length > longest:
        raise ValueError(f"`sequence_length` is {sequence_length}, but the base reads {longest} tokens: lower it.")


def check_new_folder(out: str | os.PathLike) -> Path:
    """Returns the folder that a result goes to; raises a `ValueError` if something is there already."""
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"`out` is {str(folder)!r}, where something is already: name a new folder.")
    return folder


def train_expert(
    name: str,
    base: str | os.PathLike,
    text: str | os.PathLike | Iterable[str | os.PathLike],
    out: str | os.PathLike,
    *,
    licence: str | None = None,
    lora_rank: int = 32,
    lora_alpha: float | None = None,
    target_modules: list[str] | None = None,
    sequence_length: int = 128,
    text_column: str = "text",
    epsilon: float | None = None,
    delta: float = 1e-5,
    args: TrainingArguments | None = None,
) -> ExpertFacts:
    """
    Trains an owner's expert and writes it as a folder: the adapter as PEFT does, `statistics.safetensors` with the
    sums that the router is made of, and a card, `README.md`. No text is in the folder. All owners of a mixture have
    the same base, rank, alpha and layers.

    Args:
        name (`str`):
            Of the owner.
        base (`str` or `os.PathLike`):
            A causal language model: a folder or a name on the Hub.
        text (`str`, `os.PathLike`, or several):
            Files and folders, as [`read_rows`] takes them.
        out (`str` or `os.PathLike`):
            The folder; new.
        licence (`str`, *optional*):
            Under which the owner gives the expert away.
        lora_rank (`int`, *optional*, defaults to 32):
            Rank of the adapter.
        lora_alpha (`float`, *optional*):
            The update is `lora_alpha / lora_rank * B A`. Twice the rank if left out.
        target_modules (`list[str]`, *optional*):
            Names of layers, or ends of names; the feed-forward ones if left out.
        sequence_length (`int`, *optional*, defaults to 128):
            Tokens of a sequence.
        text_column (`str`, *optional*, defaults to `"text"`):
            Column of a `.parquet` or `.jsonl`.
        epsilon (`float`, *optional*), delta (`float`, *optional*, defaults to 1e-5):
            With an epsilon the sums, not the adapter, are differentially private, see [`private_statistics`].
        args (`TrainingArguments`, *optional*):
            From [`default_arguments`]; its seed is the adapter's too.

    Returns:
        [`ExpertFacts`]

    Raises:
        `ValueError`: If an argument cannot be; names it, its value and the remedy, before training starts.
    """
    owners_as_dicts([name])
    folder = check_new_folder(out)
    args = default_arguments(folder) if args is None else args
    lora_alpha = 2 * lora_rank if lora_alpha is None else lora_alpha
    model, tokenizer = load_base(base)
    check_length(model, sequence_length)
    rows = read_rows(text, tokenizer, sequence_length, text_column)
    a_step = args.train_batch_size * args.gradient_accumulation_steps
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * math.ceil(len(rows) / a_step))
    if steps < 1:
        raise ValueError(
            f"`max_steps` is {args.max_steps} and `num_train_epochs` is {args.num_train_epochs}, with which nothing "
            "is trained: give one of them above 0."
        )
    statistics = sums_of(model, [row["input_ids"] for row in rows], epsilon, delta)
    adapted = new_adapter(model, lora_rank, lora_alpha, target_modules, args.seed)
    loss = fit_adapter(adapted, rows, args, _padding(tokenizer, rows))
    assert statistics.base_sha256 is not None
    facts = ExpertFacts(
        name=name,
        licence=licence,
        tokens=sum(len(row["input_ids"]) for row in rows),
        base=str(base),
        base_sha256=statistics.base_sha256,
        sequence_length=sequence_length,
        steps=steps,
        learning_rate=args.learning_rate,
        seed=args.seed,
        loss=round(loss, 4),
        epsilon=epsilon,
        delta=None if epsilon is None else delta,
    )
    save_expert(folder, adapted, statistics, facts)
    return facts


def _padding(tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, list[int]]]) -> PreTrainedTokenizerBase | None:
    """The tokenizer where rows have different lengths; what it pads with is neither read nor learned."""
    if len({len(row["input_ids"]) for row in rows}) == 1:
        return None
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def save_expert(folder: Path, model: PeftModel, statistics: TextStatistics, facts: ExpertFacts) -> None:
    """
    Writes an expert's folder.

    Args:
        folder (`Path`): Made if needed.
        model (`PeftModel`): The adapter.
        statistics ([`TextStatistics`]): Of the owner's text.
        facts ([`ExpertFacts`]): For the card.
    """
    config = model.peft_config[model.active_adapter]
    assert isinstance(config, LoraConfig)
    config.target_modules = sorted(config.target_modules or ())  # PEFT has a set, which is in another order each time
    model.save_pretrained(str(folder), save_embedding_layers=False)
    statistics.save(folder / STATISTICS_FILE)
    expert_card(asdict(facts)).save(folder / "README.md")
