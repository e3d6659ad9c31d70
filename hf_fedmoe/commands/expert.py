"""`hf-fedmoe expert`: owners of text train experts alone, and a server merges or removes them."""

import argparse
from typing import Any

from .one_line import announce_loading, in_one_line, refuse


def add(commands: "argparse._SubParsersAction[Any]") -> None:
    """Adds the commands."""
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
    train.set_defaults(run=_train, parser=train)
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
    merge.set_defaults(run=_merge, parser=merge)
    remove = verbs.add_parser(
        "remove",
        allow_abbrev=False,
        help="a mixture without an owner",
        description="Takes owners out of a mixture: what is written never had them, bit for bit.",
    )
    remove.add_argument("mixture", help="folder of the mixture")
    remove.add_argument("names", nargs="+", help="of the owners")
    remove.add_argument("--out", required=True, help="folder of the mixture without them, a new one")
    remove.set_defaults(run=_remove, parser=remove)


def _train(parser: argparse.ArgumentParser, options: argparse.Namespace, words: list[str]) -> None:
    announce_loading()
    with in_one_line(parser):
        from ..data.counted import counted
        from ..experiments import read_words, training_arguments
        from ..owners import default_arguments, train_expert

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
            f"{options.out}: an expert of {facts.name}, {counted(facts.tokens, 'token')}, "
            f"{counted(facts.steps, 'step')}, loss {facts.loss}"
        )


def _merge(parser: argparse.ArgumentParser, options: argparse.Namespace, words: list[str]) -> None:
    refuse(parser, words)
    announce_loading()
    with in_one_line(parser):
        from ..owners import merge_experts

        mixture = merge_experts(
            options.base,
            options.experts,
            options.out,
            options.public,
            sequence_length=options.sequence_length,
            text_column=options.text_column,
        )
        print(f"{options.out}: a mixture of {', '.join(mixture.config.expert_names)}")


def _remove(parser: argparse.ArgumentParser, options: argparse.Namespace, words: list[str]) -> None:
    refuse(parser, words)
    announce_loading()
    with in_one_line(parser):
        from ..owners import remove_owner

        fewer = remove_owner(options.mixture, options.names, options.out)
        print(f"{options.out}: a mixture of {', '.join(fewer.config.expert_names)}")
