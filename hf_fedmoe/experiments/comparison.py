"""Reads the YAML of `hf-fedmoe compare`, and checks it before anything runs."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from .characters import CharacterExperiment
from .classification import Classification
from .folders import folder_of
from .images import ImageExperiment
from .kind import Kind
from .language_experiment import LanguageExperiment
from .language_modelling import LanguageModelling
from .named_strategies import load_plugin
from .settings import LARGEST_SEED, nearest
from .texts import TextExperiment
from .yaml_files import read_yaml


KINDS: dict[str, Kind[Any]] = {
    "texts": Classification(TextExperiment),
    "images": Classification(ImageExperiment),
    "characters": Classification(CharacterExperiment),
    "language": LanguageModelling(LanguageExperiment),
}
# Settings that a comparison says elsewhere, and where.
ELSEWHERE = {
    "seed": "give `seeds`",
    "output_dir": "give `--out`",
    "compare": "give `methods`",
    "method_settings": "give a method's own settings in its row",
    "preset_name": "give `recipe_preset` in a size",
    "resume_from_checkpoint": "runs go on by themselves",
}


@dataclass
class Comparison:
    """
    Settings of a comparison, as a YAML of `hf-fedmoe compare` gives them.

    Args:
        kind (`str`): `"texts"`, `"images"`, `"characters"` or `"language"`.
        methods (`dict[str, dict]`): By row of the table: `method`, and settings that differ from those of all. What
            its strategy has an argument for is the strategy's. A method's name alone will do in the YAML.
        seeds (`list[int]`, *optional*, defaults to `[0, 1, 2]`): One run of each method for each.
        recipe (`str`, *optional*): A recipe's YAML, relative to this one. Its block `quick`, or what a size names as
            `recipe_preset`, gives settings.
        settings (`dict`, *optional*): Any of an experiment and of [`FedMoETrainingArguments`].
        sizes (`dict[str, dict]`, *optional*): By name, settings that make the comparison small or large, and under
            `methods` those of single rows. The first is taken unless told.
        columns (`list[str]`, *optional*): Metrics of the table; those of the kind if left out.
        parts (`list[str]`, *optional*): Parts of mixtures with rows of their own.
        reference (`str`, *optional*): The row that the others are counted against.
        published (`dict[str, str]`, *optional*): Figures of a paper, by row.
        claim (`str`, *optional*): What the paper says that its figures show, to stand under the table.
    """

    kind: str
    methods: dict[str, dict[str, Any]]
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    recipe: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, dict[str, Any]] = field(default_factory=dict)
    columns: list[str] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)
    reference: str | None = None
    published: dict[str, str] = field(default_factory=dict)
    claim: str | None = None


def read_comparison(path: Path) -> Comparison:
    """
    Reads the YAML of a comparison.

    Raises:
        `ValueError`: When it is none, or names what is not in it: a row, a method, a seed twice.
    """
    known = [field.name for field in fields(Comparison)]
    given = read_yaml(path)
    for name in given:
        if name not in known:
            raise ValueError(f"{path.name} has {name!r}{nearest(name, known)}")
    # A name with nothing behind it is as good as left out.
    given = {name: value for name, value in given.items() if value is not None}
    for name in ("kind", "methods"):
        if not given.get(name):
            raise ValueError(f"{path.name} has no {name!r}: a comparison needs `kind` and `methods`.")
    for name in ("methods", "settings", "sizes", "published"):
        _check_mapping(name, given.get(name, {}), "name: value")
    for name in ("columns", "parts"):
        if not isinstance(names := given.get(name, []), list) or not all(isinstance(item, str) for item in names):
            raise ValueError(f"`{name}` is {names!r}: give a list of names, [accuracy, macro_f1].")
    for name in ("kind", "recipe", "reference", "claim"):
        if not isinstance(given.get(name, ""), str):
            raise ValueError(f"`{name}` is {given[name]!r}: give a text.")
    if given["kind"] not in KINDS:
        raise ValueError(f"`kind` is {given['kind']!r}: choose one of {', '.join(map(repr, KINDS))}.")
    kind = KINDS[given["kind"]]
    comparison = Comparison(**{"columns": list(kind.columns), **given})
    if not comparison.columns:
        raise ValueError(f"`columns` is []: give at least one metric, [{kind.columns[0]}].")
    check_seeds(comparison.seeds)
    check_settings("`settings`", comparison.settings)
    sizes = [given for given in comparison.sizes.values() if isinstance(given, dict)]
    recipe = _recipe(path, comparison.recipe) if comparison.recipe else {}
    taken = {"quick", *(str(given.get("recipe_preset")) for given in sizes)}
    presets = [given for preset, given in recipe.items() if preset in taken]
    for chosen in (*presets, comparison.settings, *sizes):
        if isinstance(chosen, dict) and isinstance(plugin := chosen.get("plugin"), str):
            load_plugin(plugin)  # before rows name its methods
    comparison.methods = {row: _method(kind, row, given) for row, given in comparison.methods.items()}
    comparison.sizes = {size: given or {} for size, given in comparison.sizes.items()}
    for size, given in comparison.sizes.items():
        _check_mapping(f"sizes: {size}", given, "setting: value")
        check_settings(f"`sizes: {size}`", given)
        _check_mapping(f"sizes: {size}: methods", given.get("methods", {}), "row: {setting: value}")
        for row, changes in given.get("methods", {}).items():
            _check_mapping(f"sizes: {size}: methods: {row}", changes, "setting: value")
            check_settings(f"`sizes: {size}: methods: {row}`", changes)
    of_sizes = (row for size in comparison.sizes.values() for row in size.get("methods", {}))
    for name in filter(None, (comparison.reference, *comparison.published, *of_sizes)):
        if name not in comparison.methods:
            raise ValueError(f"{path.name} names a row {name!r}: `methods` has {', '.join(comparison.methods)}.")
    return comparison


def _recipe(path: Path, recipe: str) -> dict[str, Any]:
    """Reads the recipe's YAML that a comparison names."""
    try:
        return read_yaml(path.parent / recipe)
    except ValueError as error:
        raise ValueError(f"`recipe` of {path.name} is {recipe!r}, a path from that file's folder. {error}") from None


def check_seeds(seeds: Any) -> None:
    """Raises `ValueError` when `seeds` is no list of different whole numbers: equal ones have no spread."""
    if not isinstance(seeds, list) or not seeds:
        raise ValueError(f"`seeds` is {seeds!r}: give a list of whole numbers, [0, 1, 2].")
    for seed in seeds:
        if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed <= LARGEST_SEED:
            raise ValueError(f"`seeds` has {seed!r}: give whole numbers from 0 to {LARGEST_SEED}.")
        if seeds.count(seed) > 1:
            raise ValueError(f"`seeds` has {seed} twice, whose runs would be the same: give different ones.")


def check_settings(where: str, given: dict[str, Any]) -> None:
    """Raises `ValueError` when settings have one that a comparison says elsewhere."""
    for name in given:
        if name in ELSEWHERE:
            raise ValueError(f"{where} has {name!r}, which has no effect in a comparison: {ELSEWHERE[name]}.")


def _method(kind: Kind, row: str, given: Any) -> dict[str, Any]:
    """A row as a dictionary with its `method`."""
    folder_of(row)
    names = (*kind.method_names(), kind.untrained)
    if isinstance(given, str):
        given = {"method": given}
    if not given:
        raise ValueError(f"The row {row!r} has no method: choose from {', '.join(names)}.")
    _check_mapping(f"methods: {row}", given, "method: NAME")
    check_settings(f"`methods: {row}`", given)
    method = given.get("method", row)
    if method not in names:
        kind.check_name(str(method))
        told = f"There is no method {method!r}" if "method" in given else f"The row {row!r} has no `method`"
        raise ValueError(f"{told}{nearest(str(method), names)}")
    return {**given, "method": method}


def _check_mapping(name: str, given: Any, example: str) -> None:
    if not isinstance(given, dict):
        raise ValueError(f"`{name}` is {given!r}: write lines like `{example}`.")
