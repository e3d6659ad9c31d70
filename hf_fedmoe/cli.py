"""The command line: `hf-fedmoe compare FILE`."""

import argparse
from itertools import pairwise

import yaml

from .experiments import compare


def main(argv: list[str] | None = None) -> None:
    """What the command `hf-fedmoe` calls; errors in what it is told end it with a message, not with a traceback."""
    parser = argparse.ArgumentParser(prog="hf-fedmoe", description="Federated learning with a server-side mixture.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "compare",
        help="methods side by side over seeds, from one YAML",
        description="Runs every method of a YAML on every seed, with equal clients, initial weights and local steps. "
        "Finished runs are kept, one that was stopped goes on. Any setting can follow: --rounds 5.",
    )
    command.add_argument("file", help="the YAML; recipes/paper has examples")
    command.add_argument("--size", help="one of the YAML's sizes (the first)")
    command.add_argument("--seeds", type=int, nargs="+", help="in the place of the YAML's")
    command.add_argument("--rows", nargs="+", help="only these rows of the table")
    command.add_argument("--jobs", type=int, default=1, help="runs side by side (1)")
    command.add_argument("--out", help="folder of the runs and tables (runs/compare/NAME)")
    options, settings = parser.parse_known_args(argv)
    try:
        overrides = _settings(settings)
        table = compare(options.file, options.out, options.size, options.seeds, options.rows, options.jobs, overrides)
    except (ValueError, FileNotFoundError) as error:
        parser.exit(2, f"hf-fedmoe: {error}\n")
    print(f"\n{table}")


def _settings(words: list[str]) -> dict[str, object]:
    """`--name value` and `--name=value` pairs as a YAML would have them."""
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
    flags = [place for place, word in enumerate(words) if word.startswith("--")]
    if words and (not flags or flags[0] != 0):
        raise ValueError(f"{words[0]!r} follows no setting: write --name value.")
    settings = {}
    for start, stop in pairwise([*flags, len(words)]):
        values = [yaml.safe_load(word) for word in words[start + 1 : stop]]
        settings[words[start][2:].replace("-", "_")] = values[0] if len(values) == 1 else values
    return settings


if __name__ == "__main__":
    main()
