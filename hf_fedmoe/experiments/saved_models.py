"""Saved models put to use: scored on labelled files, and asked for the classes of others."""

import csv
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from PIL import Image
from transformers import Pipeline, pipeline

from ..data.counted import counted
from ..data.images import is_deep
from ..data.own_files import read_own_files, read_texts
from ..data.own_folders import image_endings, read_own_folders
from ..data.own_paths import check_paths
from ..model_folder import model_place
from ..models.configuration_checks import class_names
from ..reporting import scores
from .own_run import result_table


BATCH = 32
WIDTH = 70


def evaluate_saved(model: str, files: Sequence[str], text_column: str = "text", label_column: str = "label") -> str:
    """
    Scores a saved model on each of some labelled files, or folders of images.

    Args:
        model (`str`): Folder of the model or of its run, or a Hub id.
        files (`Sequence[str]`): All files, or all folders; `NAME=FILE` names one.
        text_column (`str`, *optional*), label_column (`str`, *optional*): Columns of the files.

    Returns:
        `str`: Accuracy and macro-F1 in per cent, a line for each file, and one for always naming its most frequent
        class.

    Raises:
        ValueError: When the model cannot be loaded, or a file has classes that it does not know.
    """
    images = Path(files[0].rpartition("=")[2]).is_dir()
    classify = _load(model, images)
    known = class_names(classify.model.config)
    names = [known[label] for label in range(len(known))]
    if images:
        given, _ = read_own_folders(list(files), {}, names)
    else:
        given, _ = read_own_files(list(files), {}, text_column, label_column, names)
    results = {}
    for name, rows in given.items():
        results[name] = _score(classify, rows, names)
        results[f"{name}, most frequent class"] = _most_frequent(rows, len(names))
    return result_table(results, counted(sum(map(len, given.values())), "row"))


def predict_saved(model: str, file: str, text_column: str = "text", out: str | None = None) -> str:
    """
    Asks a saved model for the classes of texts or images.

    Args:
        model (`str`): Folder of the model or of its run, or a Hub id.
        file (`str`): A `.csv`, `.jsonl`, `.json` or `.parquet` with a column of texts, a `.txt` with one in each line,
            an image, or a folder of images.
        text_column (`str`, *optional*, defaults to `"text"`): The column.
        out (`str`, *optional*): A `.csv` to write, with the columns `input`, `label` and `score`.

    Returns:
        `str`: A line for each text or image, or one that names the file that was written.

    Raises:
        ValueError: When the model or the file cannot be read.
    """
    inputs = _images(Path(file)) or _texts(Path(file), text_column)
    if out is not None:
        _check_out(Path(out), Path(file))
    for each in inputs:
        if isinstance(each, Path):
            _check_image(each)
    classify = _load(model, isinstance(inputs[0], Path))
    # By their paths: images are opened one after the other.
    answers = [answer[0] for answer in _ask(classify, [str(each) for each in inputs], top_k=1)]
    if out is None:
        return "\n".join(
            f"{answer['label']:>12s}  {answer['score']:.2f}  {' '.join(str(each).split())[:WIDTH]}"
            for each, answer in zip(inputs, answers, strict=True)
        )
    with Path(out).open("w", newline="", encoding="utf-8") as target:
        writer = csv.writer(target)
        writer.writerow(["input", "label", "score"])
        writer.writerows([each, a["label"], f"{a['score']:.4f}"] for each, a in zip(inputs, answers, strict=True))
    counts = Counter(answer["label"] for answer in answers)
    return f"{out}: {counted(len(answers), 'row')}, " + ", ".join(
        f"{name}: {count}" for name, count in counts.most_common()
    )


def _images(path: Path) -> list[Any]:
    """The images at a path, none for a file of texts."""
    endings = image_endings()
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    found = [each for each in files if each.is_file() and each.suffix.lower() in endings]
    if path.is_dir() and not found:
        raise ValueError(f"{str(path)!r} has no images: give a folder that has, or a file of texts.")
    return found


def _texts(path: Path, column: str) -> list[Any]:
    if path.suffix.lower() != ".txt":
        return read_texts(path, column)
    check_paths({"texts": path}, (".txt",), "file")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is not UTF-8 ({error}). Save the file as UTF-8.") from error
    if not (found := [line for line in lines if line.strip()]):
        raise ValueError(f"{str(path)!r} has no texts: write one in each line.")
    return found


def _check_image(path: Path) -> None:
    """Raises `ValueError` with the file's name, which Pillow leaves out, where it is damaged or too deep."""
    try:
        with Image.open(path) as image:
            _check_depth(image, str(path))
    except OSError as error:
        raise ValueError(f"{str(path)!r} cannot be read as an image: {error}. Mend it, or take it out.") from error


def _check_depth(image: Image.Image, name: str) -> None:
    """Raises `ValueError` for an image that a pipeline would cut to 8 bits, and that training refuses."""
    if is_deep(image):
        raise ValueError(f"{name!r} has the mode {image.mode!r}, more than 8 bits a channel: convert it to bytes.")


def _check_out(out: Path, file: Path) -> None:
    """Raises `ValueError` where no answers can be written, or what they answer would be lost."""
    if out.exists() and out.samefile(file):
        raise ValueError(f"`out` is {str(out)!r}, the file that is read, which would be lost: give another name.")
    if out.is_dir() or not out.parent.is_dir():
        raise ValueError(f"`out` is {str(out)!r}, where no file can be written: give one in a folder that is there.")


def _load(model: str, images: bool) -> Pipeline:
    place = model_place(model)
    try:
        return pipeline("image-classification" if images else "text-classification", model=place)
    except (OSError, ValueError, KeyError) as error:
        what = "images" if images else "texts"
        reason = " ".join(str(error).partition("See the original errors")[0].split())
        where = "" if Path(model).is_dir() else f"no folder is called so, from {Path.cwd()}, and of the Hub: "
        raise ValueError(f"{model!r} cannot be loaded as a classifier of {what}: {where}{reason[:300]}") from error


def _ask(classify: Pipeline, inputs: list[Any], top_k: int) -> list[list[dict[str, Any]]]:
    options = {} if classify.task == "image-classification" else {"truncation": True}
    return classify(inputs, batch_size=BATCH, top_k=top_k, **options)


def _score(classify: Pipeline, rows: datasets.Dataset, names: list[str]) -> dict[str, float]:
    content = "image" if "image" in rows.column_names else "text"
    place = {name: label for label, name in enumerate(names)}
    probabilities_NC = torch.zeros(len(rows), len(names))
    asked = rows[content][:]
    for row, each in enumerate(asked):
        if content == "image":
            _check_depth(each, rows.data.column(content)[row].as_py()["path"])
    for row, answers in enumerate(_ask(classify, asked, top_k=len(names))):
        for answer in answers:
            probabilities_NC[row, place[answer["label"]]] = answer["score"]
    return scores(probabilities_NC, torch.tensor(rows["label"][:]))


def _most_frequent(rows: datasets.Dataset, num_labels: int) -> dict[str, float]:
    labels_N = torch.tensor(rows["label"][:])
    always_C = torch.nn.functional.one_hot(labels_N.bincount(minlength=num_labels).argmax(), num_labels)
    return scores(always_C.float().expand(len(labels_N), -1), labels_N)
