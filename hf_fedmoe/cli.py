"""The command line `hf-fedmoe`; commands on own data, saved models and clients elsewhere are in `commands`."""

import argparse
import sys
from typing import Any, NoReturn

from . import __version__
from .commands import elsewhere, train, use
from .commands.one_line import in_one_line as _in_one_line
from .commands.one_line import refuse as _refuse
from .commands.sigterm import ending_with_sigterm


# `.experiments` is imported when it is needed: torch comes with it, and a mistyped word would take seconds.


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; `{self.prog} --help` says more.\n")


def main(argv: list[str] | None = None) -> None:
    """Runs the command `hf-fedmoe`; errors in what it is told end it with a message, not with a traceback."""
    parser = _Parser(
        prog="hf-fedmoe", description="Federated learning with a server-side mixture.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"hf_fedmoe {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train.add(commands)
    use.add(commands)
    command = commands.add_parser(
        "compare",
        allow_abbrev=False,
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
    command.set_defaults(run=_compare, parser=command)
    _add_expert_commands(commands)
    elsewhere.add(commands)
    options, words = parser.parse_known_args(argv)
    options.run(options.parser, options, words)


def _add_expert_commands(commands: "argparse._SubParsersAction[_Parser]") -> None:
    expert = commands.add_parser(
        "expert",
        allow_abbrev=False,
        help="owners of text: train an expert alone, merge experts, remove one",
        description="Owners of text who pool nothing: each trains an expert of a common base, files are all that "
        "travels.",
    )
    verbs = expert.add_subparsers(dest="verb", required=True, metavar="VERB")
    train = verbs.add_parser(
        "train",
        allow_abbrev=False,
        help="an owner's expert, its sums and its card, from text",
        description="Trains a LoRA expert on an owner's text, alone. Any of transformers' TrainingArguments can "
        "follow: --learning_rate 1e-2 --max_steps 60.",
    )
    train.add_argument("--name", required=True, help="of the owner")
    train.add_argument("--base", required=True, help="a folder, or a name on the Hub; the same for all owners")
    train.add_argument("--text", required=True, nargs="+", help="files, folders, .parquet or .jsonl of text")
    train.add_argument("--out", required=True, help="folder of the expert, a new one")
    train.add_argument("--licence", help="under which the expert is given away")
    train.add_argument("--lora_rank", type=int, default=32, help="the same for all owners (32)")
    train.add_argument("--lora_alpha", type=float, help="the same for all owners (twice the rank)")
    train.add_argument("--target_modules", nargs="+", help="layers, the same for all owners (the feed-forward ones)")
    train.add_argument("--sequence_length", type=int, default=128, help="tokens of a sequence (128)")
    train.add_argument("--text_column", default="text", help="column of a .parquet or .jsonl (text)")
    train.add_argument("--epsilon", type=float, help="of differential privacy of the sums (none)")
    train.add_argument("--delta", type=float, default=1e-5, help="likewise (1e-5)")
    train.set_defaults(run=_train_expert, parser=train)
    merge = verbs.add_parser(
        "merge",
        allow_abbrev=False,
        help="a mixture of experts on their base",
        description="Puts owners' experts together into a mixture, which writes as any language model does.",
    )
    merge.add_argument("base", help="what the experts were trained on: a folder, or a name on the Hub")
    merge.add_argument("experts", nargs="+", help="folders from `hf-fedmoe expert train`")
    merge.add_argument("--out", required=True, help="folder of the mixture, a new one")
    merge.add_argument("--public", nargs="+", help="files of text that is nobody's, which then goes to the base")
    merge.add_argument("--sequence_length", type=int, default=128, help="tokens of a sequence of it (128)")
    merge.add_argument("--text_column", default="text", help="column of a .parquet (text)")
    merge.set_defaults(run=_merge_experts, parser=merge)
    remove = verbs.add_parser(
        "remove",
        allow_abbrev=False,
        help="a mixture without an owner",
        description="Takes owners out of a mixture: what is written never had them, bit for bit.",
    )
    remove.add_argument("mixture", help="folder of the mixture")
    remove.add_argument("names", nargs="+", help="of the owners")
    remove.add_argument("--out", required=True, help="folder of the mixture without them, a new one")
    remove.set_defaults(run=_remove_owner, parser=remove)


def _compare(parser: _Parser, options: argparse.Namespace, words: list[str]) -> None:
    from .experiments import FailedRunsError, compare, read_words

    try:
        told: dict[str, Any] = read_words(words)
        with ending_with_sigterm():  # which stops the runs' processes
            table = compare(options.file, options.out, options.size, options.seeds, options.rows, options.jobs, told)
        print(f"\n{table}")
    except (ValueError, OSError, ImportError) as error:
        parser.exit(2, f"hf-fedmoe: {' '.join(str(error).split())}\n")
    except FailedRunsError as error:
        print(f"\n{error.table}")
        sys.exit(1)
    except KeyboardInterrupt:
        parser.exit(130, "hf-fedmoe: stopped; the same command goes on from the last checkpoints.\n")


def _train_expert(parser: _Parser, options: argparse.Namespace, words: list[str]) -> None:
    with _in_one_line(parser):
        from .experiments import read_words, training_arguments
        from .owners import default_arguments, train_expert

        told = training_arguments(read_words(words))
        facts = train_expert(
            options.name,
            options.base,
            options.text,
            options.out,
            licence=options.licence,
            lora_rank=options.lora_rank,
            lora_alpha=options.lora_alpha,
            target_modules=options.target_modules,
            sequence_length=options.sequence_length,
            text_column=options.text_column,
            epsilon=options.epsilon,
            delta=options.delta,
            args=default_arguments(options.out, **told),
        )
        print(
            f"{options.out}: an expert of {facts.name}, {facts.tokens} tokens, {facts.steps} steps, loss {facts.loss}"
        )


def _merge_experts(parser: _Parser, options: argparse.Namespace, words: list[str]) -> None:
    _refuse(parser, words)
    with _in_one_line(parser):
        from .owners import merge_experts

        mixture = merge_experts(
            options.base,
            options.experts,
            options.out,
            options.public,
            sequence_length=options.sequence_length,
            text_column=options.text_column,
        )
        print(f"{options.out}: a mixture of {', '.join(mixture.config.expert_names)}")


def _remove_owner(parser: _Parser, options: argparse.Namespace, words: list[str]) -> None:
    _refuse(parser, words)
    with _in_one_line(parser):
        from .owners import remove_owner

        fewer = remove_owner(options.mixture, options.names, options.out)
        print(f"{options.out}: a mixture of {', '.join(fewer.config.expert_names)}")


if __name__ == "__main__":
    main()
