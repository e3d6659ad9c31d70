"""Experts of several owners put together, and an owner taken out again: from folders to folders."""

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from json import JSONDecodeError
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.utils.other import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from yaml import YAMLError

from ..data import pack
from ..models import FedMoECausalConfig, FedMoEForCausalLM, TextStatistics
from ..models.lora_fedmoe_causal import find_targets
from ..models.router_fedmoe_causal import PREFIXES
from .cards import mixture_card, owner_in_card
from .texts import read_texts
from .train import STATISTICS_FILE, check_length, check_new_folder, load_base, sums_of


# A feature more takes as many tokens more, at least.
FEWEST_TOKENS = PREFIXES[0]


@dataclass(frozen=True)
class _Expert:
    """An expert's folder, read but for its weights."""

    folder: Path
    owner: dict[str, Any]
    shape: dict[str, Any]
    statistics: TextStatistics


def merge_experts(
    base: str | os.PathLike,
    experts: Sequence[str | os.PathLike],
    out: str | os.PathLike,
    public: str | os.PathLike | Iterable[str | os.PathLike] | None = None,
    *,
    sequence_length: int = 128,
    text_column: str = "text",
) -> FedMoEForCausalLM:
    """
    Makes a mixture of owners' experts and writes it as a folder, which `from_pretrained` loads.

    Args:
        base (`str` or `os.PathLike`):
            The base that the experts were trained on: a folder or a name on the Hub. The mixture has it by this name.
        experts (`Sequence[str]`):
            Folders from [`train_expert`]. (PEFT adapters with a `statistics.safetensors` beside them do as well;
            where no card tells the owner's name it is the folder's.)
        out (`str` or `os.PathLike`):
            The folder; new.
        public (`str`, `os.PathLike`, or several, *optional*):
            Files and folders of text that is nobody's: without it the base has no weight in the mixture.
        sequence_length (`int`, *optional*, defaults to 128):
            Tokens of a sequence of the public text.
        text_column (`str`, *optional*, defaults to `"text"`):
            Column of a `.parquet`.

    Returns:
        [`FedMoEForCausalLM`]

    Raises:
        `ValueError`: If an expert was trained on another base, or is of another rank, scale or layers; names the
            folder, the value and the remedy, before anything is written.
    """
    folder = check_new_folder(out)
    if isinstance(experts, (str, os.PathLike)) or not experts:
        raise ValueError(f"`experts` is {experts!r}: name the folders of experts, one at least.")
    read = [_read_expert(Path(expert)) for expert in experts]
    _check_one_shape(read)
    public_texts = None if public is None else read_texts(public, text_column)
    loaded, tokenizer = load_base(base)
    public_sums = None
    if public_texts is not None:
        check_length(loaded, sequence_length)
        public_sums = sums_of(loaded, pack(tokenizer, public_texts, sequence_length))
    shape = read[0].shape
    # The layers are left out of the configuration where they are those that it has by itself.
    targets = find_targets(loaded, shape["layers"])
    usual = list(targets) == list(find_targets(loaded))
    mixture = FedMoEForCausalLM.from_base(
        base,
        lora_rank=shape["r"],
        lora_alpha=shape["lora_alpha"],
        target_modules=None if usual else list(targets),
    )
    for expert in read:
        found, expected = expert.statistics.base_sha256, mixture.config.base_sha256
        if found != expected:
            raise ValueError(
                f"`experts` has {str(expert.folder)!r} of a base with `base_sha256` {found!r}, but {str(base)!r} has "
                f"{expected!r}: name the base that it was trained on, or have it trained on this one."
            )
        most = expert.owner.get("tokens", math.inf) // FEWEST_TOKENS
        if expert.statistics.count > most:
            raise ValueError(
                f"`experts` has {str(expert.folder)!r} with sums over {expert.statistics.count} features, and its "
                f"card tells of {expert.owner['tokens']} tokens, which have {most:.0f} at most: have it sent again."
            )
    for expert in read:
        try:
            mixture = mixture.add_owner(expert.folder, expert.statistics, **expert.owner)
        except ValueError as error:
            raise ValueError(f"`experts` has {str(expert.folder)!r}: {error}") from error
    if public_sums is not None:
        mixture.set_statistics("base", public_sums)
    _write(mixture, tokenizer, folder)
    return mixture


def remove_owner(mixture: str | os.PathLike, names: str | Sequence[str], out: str | os.PathLike) -> FedMoEForCausalLM:
    """
    Takes owners out of a mixture on disk; what is written is, bit for bit, a mixture that never had them.

    Args:
        mixture (`str` or `os.PathLike`): Folder of the mixture, or its name on the Hub.
        names (`str` or `Sequence[str]`): Of the owners.
        out (`str` or `os.PathLike`): The folder; new.

    Returns:
        [`FedMoEForCausalLM`]

    Raises:
        `ValueError`: If there is no such owner, or `mixture` is none, before anything is written.
    """
    folder = check_new_folder(out)
    try:
        kind = FedMoECausalConfig.get_config_dict(mixture)[0].get("model_type")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`mixture` is {str(mixture)!r}, which cannot be loaded: name a folder that `hf-fedmoe expert merge` "
            f"wrote, or a name on the Hub while there is a network. It says: {error}"
        ) from error
    if kind != FedMoECausalConfig.model_type:
        raise ValueError(f"`mixture` is {str(mixture)!r}, a model of type {kind!r}: name a mixture of owners.")
    model = FedMoEForCausalLM.from_pretrained(mixture)
    fewer = model.without(*([names] if isinstance(names, str) else names))
    _write(fewer, AutoTokenizer.from_pretrained(mixture), folder)
    return fewer


def _read_expert(folder: Path) -> _Expert:
    try:
        return _read_files(folder)
    # Each format has an error of its own for a file that is damaged or none of its kind.
    except (SafetensorError, YAMLError, JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"`experts` has {str(folder)!r}, of which a file cannot be read ({type(error).__name__}: {error}): have "
            "it sent again, as `hf-fedmoe expert train` wrote it."
        ) from error


def _read_files(folder: Path) -> _Expert:
    for file in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, STATISTICS_FILE):
        if not (folder / file).is_file():
            raise ValueError(
                f"`experts` has {str(folder)!r} without {file!r}: name a folder that `hf-fedmoe expert train` wrote."
            )
    config = PeftConfig.from_pretrained(str(folder)).to_dict()
    with safe_open(folder / SAFETENSORS_WEIGHTS_NAME, "pt") as file:
        keys = list(file.keys())
    prefix, suffix = "base_model.model.", ".lora_A.weight"
    layers = sorted(key.removeprefix(prefix).removesuffix(suffix) for key in keys if key.endswith(suffix))
    alpha, rank = config.get("lora_alpha"), config.get("r")
    if not layers or not alpha or not rank:
        raise ValueError(f"`experts` has {str(folder)!r}, which is no LoRA adapter: train one.")
    # Rank-stabilised adapters are scaled by another root of the rank.
    shape = {"r": rank, "lora_alpha": alpha * rank**0.5 if config.get("use_rslora") else alpha, "layers": layers}
    owner = {"name": folder.resolve().name, **owner_in_card(folder / "README.md")}
    return _Expert(folder, owner, shape, TextStatistics.load(folder / STATISTICS_FILE))


def _check_one_shape(experts: Sequence[_Expert]) -> None:
    first = experts[0]
    for expert in experts[1:]:
        for field, value in expert.shape.items():
            expected = first.shape[field]
            if value != expected:
                if field == "layers":
                    value, expected = (f"{len(names)} layers such as {names[0]!r}" for names in (value, expected))
                raise ValueError(
                    f"`experts` has {str(expert.folder)!r} with `{field}` {value}, where {str(first.folder)!r} has "
                    f"{expected}: leave one of them out, or have it trained again with the values of the others."
                )


def _write(mixture: FedMoEForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    mixture.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    mixture_card(mixture.config).save(folder / "README.md")
