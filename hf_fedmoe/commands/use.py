"""`hf-fedmoe evaluate`, `predict`, `card` and `push`: what one does with a saved model."""

import argparse
import json
from pathlib import Path
from typing import Any

from ..model_folder import model_folder
from .one_line import announce_loading, in_one_line, quietly, refuse


def add(commands: "argparse._SubParsersAction[Any]") -> None:
    """Adds the commands."""
    evaluate = commands.add_parser(
        "evaluate",
        allow_abbrev=False,
        help="a saved model on labelled files, or folders of images",
        description="Scores a saved model on labelled files, or on folders of images with one in it for each class.",
    )
    evaluate.add_argument("model", help="folder of a model or of its run, or a Hub id")
    evaluate.add_argument("files", nargs="+", help="files, or folders of images, each scored by itself")
    evaluate.add_argument("--text_column", default="text", metavar="NAME", help="column of texts (text)")
    evaluate.add_argument("--label_column", default="label", metavar="NAME", help="column of labels (label)")
    evaluate.set_defaults(run=_evaluate, parser=evaluate)

    predict = commands.add_parser(
        "predict",
        allow_abbrev=False,
        help="a saved model's answers for a file of texts, or for images",
        description="Prints, or writes as .csv, the class of each text of a file (.txt has one in a line) or image.",
    )
    predict.add_argument("model", help="folder of a model or of its run, or a Hub id")
    predict.add_argument("file", help="a .csv, .jsonl, .json, .parquet or .txt, an image, or a folder of images")
    predict.add_argument("--text_column", default="text", metavar="NAME", help="column of texts (text)")
    predict.add_argument("--out", metavar="FILE", help="a .csv to write in the place of printing")
    predict.set_defaults(run=_predict, parser=predict)

    card = commands.add_parser(
        "card",
        allow_abbrev=False,
        help="a saved model's card: shown, or its facts filled in",
        description="Shows the card of a saved model, or fills in facts that the Hub reads.",
    )
    card.add_argument("model", help="folder of a model or of its run")
    card.add_argument("--language", nargs="+", help="of the texts: en")
    card.add_argument("--license", help="of the weights, by its Hub name: apache-2.0")
    card.add_argument("--base_model", help="Hub id of the start")
    card.add_argument("--datasets", nargs="+", help="Hub ids of the data, if it is there")
    card.add_argument("--tags", nargs="+", help="further tags")
    card.add_argument("--widget", nargs="+", metavar="TEXT", help="examples on the Hub's page; no client's own")
    card.set_defaults(run=_card, parser=card)

    push = commands.add_parser(
        "push",
        allow_abbrev=False,
        help="a saved model to the Hugging Face Hub",
        description="Uploads the folder of a saved model with its card; `hf auth login` comes first.",
    )
    push.add_argument("model", help="folder of a model or of its run, or of a Space")
    push.add_argument("repository", help="NAME/MODEL on the Hub; it is made if it is not there")
    push.add_argument("--space", action="store_true", help="it is a Space, from `hf-fedmoe demo MODEL --space FOLDER`")
    push.add_argument("--private", action="store_true", help="a new repository is seen by its owners only")
    push.set_defaults(run=_push, parser=push)


def _evaluate(parser: argparse.ArgumentParser, options: argparse.Namespace, words: list[str]) -> None:
    refuse(parser, words)
    announce_loading()
    with in_one_line(parser):
        from ..experiments import evaluate_saved

        with quietly():
            print(evaluate_saved(options.model, options.files, options.text_column, options.label_column))


def _predict(parser: argparse.ArgumentParser, options: argparse.Namespace, words: list[str]) -> None:
    refuse(parser, words)
    announce_loading()
    with in_one_line(parser):
        from ..experiments import predict_saved

        with quietly():
            print(predict_saved(options.model, options.file, options.text_column, options.out))


def _card(parser: argparse.ArgumentParser, options: argparse.Namespace, words: list[str]) -> None:
    refuse(parser, words)
    with in_one_line(parser):
        from huggingface_hub import ModelCard

        _check_not_blank(options)
        path = model_folder(options.model) / "README.md"
        if not path.is_file():
            raise ValueError(f"There is no card {str(path)!r}: `hf-fedmoe train` and `create_model_card` write one.")
        card = ModelCard.load(path)
        facts = {name: vars(options)[name] for name in ("language", "license", "base_model", "datasets")}
        given = {name: value for name, value in facts.items() if value is not None}
        if options.tags:
            given["tags"] = list(dict.fromkeys([*(card.data.tags or []), *options.tags]))
        if options.widget:
            given["widget"] = [{"text": text} for text in options.widget]
        for name, value in given.items():
            card.data[name] = value
        if given:
            card.save(path)
        print(f"{path}: {', '.join(given)} filled in" if given else card.content)


def _check_not_blank(options: argparse.Namespace) -> None:
    """Refuses facts without a letter, which the Hub would refuse after the upload."""
    for name in ("language", "license", "base_model", "datasets", "tags", "widget"):
        given = vars(options)[name]
        if any(not each.strip() for each in ([given] if isinstance(given, str) else given or ())):
            raise ValueError(f"`{name}` is {given!r}: say what it is, or leave it out.")


def _push(parser: argparse.ArgumentParser, options: argparse.Namespace, words: list[str]) -> None:
    refuse(parser, words)
    with in_one_line(parser):
        from huggingface_hub import HfApi

        api = HfApi()
        if options.space:
            print(_push_space(api, Path(options.model), options.repository, options.private))
            return
        folder = model_folder(options.model)
        _check_base(folder)
        name = api.create_repo(options.repository, private=options.private or None, exist_ok=True).repo_id
        print(api.upload_folder(repo_id=name, folder_path=folder, ignore_patterns=["checkpoint-*"]).commit_url)


def _push_space(api: Any, folder: Path, repository: str, private: bool) -> str:
    """Uploads a Space, and returns the address of the commit."""
    if not (folder / "app.py").is_file():
        raise ValueError(f"{str(folder)!r} is no folder of a Space: `hf-fedmoe demo MODEL --space FOLDER` writes one.")
    name = api.create_repo(
        repository, repo_type="space", space_sdk="gradio", private=private or None, exist_ok=True
    ).repo_id
    return api.upload_folder(repo_id=name, repo_type="space", folder_path=folder).commit_url


def _check_base(folder: Path) -> None:
    """Refuses an adapter whose base nobody else has, and whose file names a folder of this machine."""
    file = folder / "adapter_config.json"
    base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path") if file.is_file() else None
    if base and Path(base).exists():
        raise ValueError(
            f"{str(folder)!r} is an adapter of the folder {base!r}, which is on this machine only: train it from a "
            "model of the Hub, or by fedmoe, which saves the base with its experts."
        )
