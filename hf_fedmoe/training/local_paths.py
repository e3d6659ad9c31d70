"""Paths of this machine, which are nobody else's business and lead nowhere on another."""

import json
import os
from pathlib import Path
from typing import Any


def without_local_paths(values: Any) -> Any:
    """Returns JSON values whose absolute paths, at any depth, are cut to their last names."""
    if isinstance(values, dict):
        return {name: without_local_paths(value) for name, value in values.items()}
    if isinstance(values, list):
        return [without_local_paths(value) for value in values]
    return Path(values).name if isinstance(values, str) and os.path.isabs(values) else values


def forget_where_it_was(config_file: Path) -> None:
    """Takes out of a saved configuration, and of those in it, the folders that models were loaded from."""
    if config_file.is_file():
        config = json.loads(config_file.read_text(encoding="utf-8"))
        if _forget(config):
            config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _forget(config: dict[str, Any]) -> bool:
    name = config.get("_name_or_path")
    local = isinstance(name, str) and (os.path.isabs(name) or (name != "" and Path(name).exists()))
    if local:
        del config["_name_or_path"]
    found = [_forget(value) for value in config.values() if isinstance(value, dict)]
    return local or any(found)
