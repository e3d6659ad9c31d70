"""From files to a model that answers: `hf-fedmoe train`, `evaluate`, `predict`, `card` and `push`."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

from hf_fedmoe.cli import main
from tests.loopback_hub import loopback_hub
from tests.tiny_models import VOCAB_SIZE, tiny_bert
from tests.tiny_tokenizer import tiny_tokenizer


REPOSITORY = Path(__file__).parents[2]
CLASSES = ["bad", "fair", "good"]
OPTIONS = [
    "--text_column",
    "review",
    "--label_column",
    "mood",
    "--rounds",
    "4",
    "--learning_rate",
    "3e-3",
    "--use_cpu",
    "--disable_tqdm",
]


def write_file(path: Path, count: int, seed: int) -> None:
    """Texts of the tests' words, most of them of the third of the vocabulary that belongs to their class."""
    rng = np.random.default_rng(seed)
    third = (VOCAB_SIZE - 4) // len(CLASSES)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["review", "mood"])
        for label in rng.integers(len(CLASSES), size=count):
            words = rng.integers(third, size=12) + 2 + label * third
            writer.writerow([" ".join(f"w{word}" for word in words), CLASSES[label]])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with three clients' files, a test and a start."""
    folder = tmp_path_factory.mktemp("own")
    for seed, (name, count) in enumerate({"north": 60, "south": 40, "east": 50, "test": 40}.items()):
        write_file(folder / f"{name}.csv", count, seed)
    torch.manual_seed(7)
    tiny_bert(5, hidden_dropout_prob=0.0).save_pretrained(folder / "start")  # a head of another size is drawn anew
    tiny_tokenizer().save_pretrained(folder / "start")
    return folder


def read(path: Path | str) -> list[dict[str, str]]:
    return list(csv.DictReader(Path(path).read_text().splitlines()))


def said(capsys, *words: str) -> str:
    main(list(map(str, words)))
    return capsys.readouterr().out


def refused(capsys, *words: str) -> str:
    """Returns the line that a command says for each fault of a file, and ends with exit code 2."""
    with pytest.raises(SystemExit) as ended:
        main(list(map(str, words)))
    assert ended.value.code == 2
    first, *others = capsys.readouterr().err.strip().split("\n")
    assert first.startswith("hf-fedmoe ") and all(re.match(r"(`\w+` of )?'", line) for line in others)
    return "\n".join([first, *others])


@pytest.fixture(scope="module")
def trained(place):
    """The run of all that follows, and what it said."""
    before = Path.cwd()
    os.chdir(place)
    capture = pytest.MonkeyPatch()
    lines: list[str] = []
    capture.setattr("builtins.print", lambda *parts, **kwargs: lines.append(" ".join(map(str, parts))))
    try:
        clients = ["--clients", "north.csv", "hill=south.csv", "east.csv", "--test", "test.csv"]
        clients += ["--classes", "bad", "fair", "good"]
        main(["train", *clients, "--model", "start", *OPTIONS, "--output_dir", "runs/mine", "--seed", "3"])
    finally:
        capture.undo()
        os.chdir(before)
    return place / "runs" / "mine", "\n".join(lines)


def accuracy_of(row: str, text: str) -> float:
    return float(re.search(rf"^{re.escape(row)} +(\d+\.\d) +\d+\.\d$", text, re.MULTILINE)[1])


def test_train_tells_what_the_result_is_worth(trained):
    folder, text = trained
    results = json.loads((folder / "results.json").read_text())
    assert list(results) == ["majority_class", "fedavg_tuned_at_end", "fedmoe"]
    labels = [row["mood"] for row in read(folder.parents[1] / "test.csv")]
    assert accuracy_of("fedmoe", text) == round(100 * results["fedmoe"]["accuracy"], 1) > 60
    assert accuracy_of("fedavg_tuned_at_end (control)", text) > 60
    assert accuracy_of("majority class", text) <= round(100 * max(map(labels.count, CLASSES)) / 40, 1)
    assert "A control of the same start and rounds" in text and "--control none" in text
    assert "starting from start" in text and "seed 3" in text and "learning rate 0.003" in text
    assert re.search(r"^client hill +36 ", text, re.MULTILINE)  # a tenth is reserved
    assert "One seed and 40 test rows leave about ±" in text and "Try" not in text
    assert {"clients.png", "gate.png", "model", "fedmoe"} <= {path.name for path in folder.iterdir()}


def test_the_model_scores_as_it_did_and_knows_its_clients(trained, place, capsys, monkeypatch):
    folder, text = trained
    monkeypatch.chdir(place)
    columns = ["--text_column", "review", "--label_column", "mood"]
    told = said(capsys, "evaluate", "runs/mine", "test.csv", "north.csv", *columns)
    assert accuracy_of("test", told) == accuracy_of("fedmoe", text)
    assert accuracy_of("north, most frequent class", told) < 50 and told.startswith("100 rows")
    card = ModelCard.load(folder / "model" / "README.md")
    assert card.data.model_name == "mine" and re.search(r"\| hill +\| +36 +\| +4 +\|", card.text)
    results = json.loads((folder / "results.json").read_text())
    assert card.data.eval_results[0].dataset_name == "the clients' own"
    assert f"{results['fedavg_tuned_at_end']['accuracy']:.4f}" in card.text


def test_nothing_that_is_saved_names_a_folder_of_this_machine(trained, place):
    files = [path for path in (trained[0] / "model").iterdir() if path.suffix in (".json", ".md", ".py")]
    assert len(files) > 8
    assert [path.name for path in files if str(place) in path.read_text() or str(REPOSITORY) in path.read_text()] == []


def test_predict_prints_or_writes(trained, place, capsys, monkeypatch):
    monkeypatch.chdir(place)
    texts = [row["review"] for row in read("test.csv")]
    printed = said(capsys, "predict", "runs/mine/model", "test.csv", "--text_column", "review").splitlines()
    assert len(printed) == 40 and printed[0].split()[0] in CLASSES and texts[0][:30] in printed[0]
    Path("lines.txt").write_text("\n".join(texts[:3]) + "\n\n")
    told = said(capsys, "predict", "runs/mine", "lines.txt", "--out", "answers.csv")
    answers = read("answers.csv")
    assert [answer["input"] for answer in answers] == texts[:3] and told.startswith("answers.csv: 3 rows, ")
    assert [answer["label"] for answer in answers] == [line.split()[0] for line in printed[:3]]


def test_card_is_filled_in_and_shown(trained, place, capsys, monkeypatch):
    monkeypatch.chdir(place)
    told = said(
        capsys,
        "card",
        "runs/mine",
        "--language",
        "en",
        "--license",
        "cc0-1.0",
        "--tags",
        "shops",
        "fedmoe",
        "--widget",
        "A fine coat.",
    )
    assert told == "runs/mine/model/README.md: language, license, tags, widget filled in\n"
    data = ModelCard(said(capsys, "card", "runs/mine")).data
    assert data.language == ["en"] and data.license == "cc0-1.0" and data.tags.count("fedmoe") == 1
    assert data.widget == [{"text": "A fine coat."}]
    assert data.tags[-1] == "shops" and len(data.eval_results) == 4


def test_push_uploads_the_folder(trained):
    with loopback_hub() as hub:
        environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_loopback", "HF_HUB_OFFLINE": "0"}
        environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
        environment |= {"PYTHONPATH": str(REPOSITORY)}
        command = [sys.executable, "-m", "hf_fedmoe.cli", "push", str(trained[0]), "user/model"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "/user/model/commit/" in done.stdout
        saved = {path.name for path in (trained[0] / "model").iterdir()}
        assert saved <= hub.files.keys() and "model.safetensors" in saved


def test_adapters_are_saved_with_a_base_of_this_machine(place, capsys, monkeypatch, tmp_path):
    shutil.copytree(place / "start", tmp_path / "start")
    monkeypatch.chdir(tmp_path)
    files = [place / "north.csv", place / "east.csv"]
    model = ["--model", "start", "--lora", "--rank", "4", "--control", "none", "--max_length", "8"]
    text = said(capsys, "train", "--clients", *files, *model, *OPTIONS, "--output_dir", "runs/lora")
    shutil.rmtree(tmp_path / "start")
    columns = ["--text_column", "review", "--label_column", "mood"]
    told = said(capsys, "evaluate", "runs/lora", place / "test.csv", *columns)
    assert accuracy_of("test", told) > 0 and "control" not in text
    assert "100% of the texts are cut after 8 tokens (--max_length)." in text
    assert "peft_config" in json.loads(Path("runs/lora/model/config.json").read_text())


def test_personal_methods_are_tested_at_their_clients(place, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    method = ["--method", "fedavg_plus", "--client_test_share", "0.2", "--output_dir", "runs/personal"]
    files = [place / "north.csv", place / "east.csv"]
    text = said(capsys, "train", "--clients", *files, "--model", place / "start", *OPTIONS, *method)
    assert "fedavg (control)" in text and Path("runs/personal/client_accuracies.png").is_file()
    results = json.loads(Path("runs/personal/results.json").read_text())
    served = text.partition("Each client's model on its own")[2]
    assert accuracy_of("fedavg_plus", served) == round(100 * results["fedavg_plus"]["clients_accuracy"], 1)


def test_images_of_folders(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for client in ("a", "b"):
        for label, name in enumerate(("dark", "light")):
            Path(client, name).mkdir(parents=True)
            for number in range(20):
                pixels = rng.integers(100, size=(8, 8, 3), dtype=np.uint8) + 120 * label
                Image.fromarray(pixels.astype(np.uint8)).save(Path(client, name, f"{number}.png"))
    words = "--rounds 2 --image_size 8 --method fedavg --use_cpu --disable_tqdm --output_dir runs/shades"
    text = said(capsys, "train", "--images", "a", "b", "--validation", "0.1", *words.split())
    assert accuracy_of("fedavg", text) == 100 and "fedavg_tuned_at_end" not in text
    assert re.search(r"round 2/2  loss \d\.\d+  accuracy \d+\.\d %", text)
    assert accuracy_of("b", said(capsys, "evaluate", "runs/shades", "a", "b")) == 100
    told = said(capsys, "predict", "runs/shades", "a/light").splitlines()
    assert len(told) == 20 and all(line.split()[0] == "light" for line in told)
    turned = Image.Exif()
    turned[0x0112] = 6  # by a quarter, as of a photograph
    Image.new("RGB", (8, 8), "white").save("b/light/turned.png", exif=turned)
    assert "100.0" in said(capsys, "evaluate", "runs/shades", "b")
    Image.fromarray(np.full((8, 8), 60_000, dtype=np.uint16)).save("a/light/deep.png")
    for words in (("evaluate", "runs/shades", "a"), ("predict", "runs/shades", "a/light")):
        assert "deep.png' has the mode 'I;16', more than 8 bits a channel: convert it" in refused(capsys, *words)


CLIENTS = ["--clients", "north.csv", "south.csv"]
COLUMNS = ["--text_column", "review", "--label_column", "mood"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (COLUMNS, "hf-fedmoe train: give either --clients, a file of each client, or --images, a folder of each"),
        (
            ["--images", "a", "b", "--lora"],
            "`--lora` is for models of texts: with `--images` clients train whole",
        ),
        (CLIENTS, "hf-fedmoe train: `text_column` is missing: name the column of the files, --text_column NAME."),
        ([*CLIENTS, *COLUMNS, "--learnin_rate", "1"], "There is no setting 'learnin_rate': is it learning_rate"),
        ([*CLIENTS, *COLUMNS, "--rounds", "many"], "`rounds` is 'many': give a whole number."),
        ([*CLIENTS, *COLUMNS, "--num_clients", "9"], "`num_clients` is a setting of simulated clients, and yours are"),
        ([*CLIENTS, *COLUMNS, "--label_names", "a", "b"], "`label_names` names columns of a batch: the classes in"),
        ([*CLIENTS, *COLUMNS, "--method", "fedmo"], "There is no method 'fedmo': is it fedmoe"),
        ([*CLIENTS, *COLUMNS, "--control", "fedag"], "There is no method 'fedag': is it fedavg"),
        ([*CLIENTS, *COLUMNS, "--model", "strat"], "The model 'strat' cannot be loaded"),
        (
            [*CLIENTS, *COLUMNS, "--model", "gpt2-review"],
            "'gpt2-review' cannot be loaded: is it 'gpt2-reviews'",
        ),
        ([*CLIENTS, *COLUMNS, "--test", "0"], "`test` is 0, and nobody would know what the model is worth"),
        ([*CLIENTS, "--text_column", "reviw", "--label_column", "mood"], "'reviw' for text: is it 'review'?"),
        (["--clients", "nort.csv", *COLUMNS], "There is no file 'nort.csv' of 'nort': is it 'north.csv'?"),
        ([*CLIENTS, *COLUMNS, "--reserved", "0"], "`reserved` is 0, but fedmoe learns on labelled rows of the server"),
    ],
)
def test_mistakes_are_said_in_a_line_before_anything_is_trained(place, monkeypatch, capsys, words, message):
    monkeypatch.chdir(place)
    start = [] if "--model" in words else ["--model", "start"]
    assert message in refused(capsys, "train", *words, *start, "--use_cpu", "--output_dir", "runs/wrong")
    assert not list(place.glob("runs/wrong/*/checkpoint-*"))


def test_mistakes_with_saved_models(trained, place, capsys, monkeypatch):
    monkeypatch.chdir(place)
    assert "'runs/mien' cannot be loaded as a classifier of texts: no folder is called so, from" in refused(
        capsys, "predict", "runs/mien", "test.csv", "--text_column", "review"
    )
    assert "no column 'text' for text" in refused(capsys, "predict", "runs/mine", "test.csv")
    Path("cut.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
    assert "'cut.png' cannot be read as an image: " in refused(capsys, "predict", "runs/mine", "cut.png")
    before = Path("test.csv").read_bytes()
    for out, message in (("./test.csv", "the file that is read, which would be lost"), ("no/a.csv", "no file can be")):
        told = refused(capsys, "predict", "runs/mine", "test.csv", "--text_column", "review", "--out", out)
        assert message in told
    assert Path("test.csv").read_bytes() == before
    Path("latin.txt").write_bytes(b"caf\xe9\n")
    assert "'latin.txt' is not UTF-8" in refused(capsys, "predict", "runs/mine", "latin.txt")
    assert "There is no file 'tset.txt' of 'texts'" in refused(capsys, "predict", "runs/mine", "tset.txt")
    Path("other.csv").write_text("review,mood\nw3,bad\nw4,goood\n")
    told = refused(capsys, "evaluate", "runs/mine", "other.csv", *COLUMNS)
    assert "is 'goood' in row 2, which classes has not: is it 'good'?" in told
    for command in (["card", "runs"], ["predict", "runs", "latin.txt"], ["evaluate", "runs", "test.csv", *COLUMNS]):
        Path("latin.txt").write_text("a text\n")
        assert "'runs' is no folder of a model, nor of a run" in refused(capsys, *command)
    before = Path("runs/mine/model/README.md").read_bytes()
    for words in (["--license", ""], ["--language", "en", " "], ["--tags", ""]):
        assert f"`{words[0][2:]}` is " in refused(capsys, "card", "runs/mine", *words)
    assert Path("runs/mine/model/README.md").read_bytes() == before
    Path("adapter").mkdir(exist_ok=True)
    Path("adapter", "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "start"}))
    told = refused(capsys, "push", "adapter", "user/model")
    assert "'adapter' is an adapter of the folder 'start', which is on this machine only" in told
    assert "unrecognized arguments: --lang" in refused(capsys, "card", "runs/mine", "--lang", "en")
