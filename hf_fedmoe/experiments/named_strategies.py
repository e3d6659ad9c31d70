"""The strategies of recipes and comparisons by their names, and those of a user's own file."""

import functools
import importlib.util
import sys
from pathlib import Path

from .. import strategies
from ..strategies import FedAvgReserved, FedMoE, Owners, Strategy


# A new one is here as soon as `hf_fedmoe.strategies` has it, but for that of language models, which have no classes.
STRATEGIES: dict[str, type[Strategy]] = {
    strategy.name: strategy
    for strategy in vars(strategies).values()
    if isinstance(strategy, type) and issubclass(strategy, Strategy) and strategy not in (Strategy, FedMoE, Owners)
}
STRATEGIES["fedavg_tuned_at_end"] = FedAvgReserved
PREFIX = "hf_fedmoe_plugin_"  # of modules that plugins become
# Trained on the reserved set alone.
CENTRALISED = ("reserved_only", "cent_moe")
# Trained on nothing: the most frequent class.
MAJORITY = "majority_class"


def method_names() -> tuple[str, ...]:
    """Lists the names of all methods, those of files that were loaded among them."""
    return (*STRATEGIES, *CENTRALISED, "fedmoe")


def load_plugin(file: str) -> None:
    """
    Adds the strategies of a Python file to [`STRATEGIES`], by their `name`. It is run once in a process.

    Args:
        file (`str`): Its path, from the working folder; `~` is the home folder.

    Raises:
        ValueError: When there is no such file, it fails, has no strategy, or one whose name another has.
    """
    _load(str(Path(file).expanduser().resolve()), file)


def source_of(method: str) -> str | None:
    """Returns the text of the plugin that a method is from, `None` for one of this package's own."""
    module = sys.modules.get(STRATEGIES[method].__module__) if method in STRATEGIES else None
    if module is None or module.__file__ is None or not module.__name__.startswith(PREFIX):
        return None
    return Path(module.__file__).read_text(encoding="utf-8")


@functools.cache
def _load(path: str, file: str) -> None:
    begin = f"`plugin` is {file!r}"
    if not Path(path).is_file() or not path.endswith(".py"):
        raise ValueError(f"{begin}: give a Python file that is there.")
    spec = importlib.util.spec_from_file_location(f"{PREFIX}{Path(path).stem}", path)
    assert spec is not None and spec.loader is not None  # as of every file that ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where data classes look for their module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ValueError(f"{begin}, which cannot be run. It says: {type(error).__name__}: {error}") from error
    own = [
        found
        for found in vars(module).values()
        if isinstance(found, type) and issubclass(found, Strategy) and found.__module__ == module.__name__
    ]
    # Others of the file may have a base in common that is no method.
    own = [found for found in own if "name" in vars(found) or not any(found in other.__mro__[1:] for other in own)]
    if not own:
        raise ValueError(f"{begin}, which has no subclass of `Strategy`: see docs/strategies.md.")
    names = [*method_names(), MAJORITY]
    for strategy in own:
        if "name" not in vars(strategy):
            raise ValueError(f'{begin}, whose {strategy.__name__} has no name: write `name = "..."` in the class.')
        if not isinstance(strategy.name, str) or not strategy.name.isidentifier():
            raise ValueError(
                f"{begin}, whose {strategy.__name__} is named {strategy.name!r}: take letters, digits and _."
            )
        if strategy.name in names:
            raise ValueError(
                f"{begin}, whose {strategy.__name__} is named {strategy.name!r}, as another method is: change `name`."
            )
        names.append(strategy.name)
    STRATEGIES.update({strategy.name: strategy for strategy in own})
