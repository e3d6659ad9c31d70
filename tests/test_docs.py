"""The blocks of README.md and docs/ run as they stand, in the order of the page."""

import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import torch
from peft import PeftModel
from transformers import AutoTokenizer, pipeline

from hf_fedmoe import FedMoEForCausalLM
from hf_fedmoe.cli import main as run_command
from hf_fedmoe.data import load_source
from hf_fedmoe.experiments import compare
from hf_fedmoe.strategies import FedAvg
from hf_fedmoe.training import FederatedTrainer
from tests.tiny_federation import assert_equal_states, state, tiny_args, tiny_expert, tiny_federation


REPOSITORY = Path(__file__).parents[1]
PAGES = [str(path.relative_to(REPOSITORY)) for path in sorted((REPOSITORY / "docs").rglob("*.md"))]


def blocks(page: str, language: str = "python") -> list[str]:
    """The blocks of a page in one language."""
    text = (REPOSITORY / page).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def run(source: str, names: dict | None = None) -> dict:
    """Executes a block; its names come back, and may be those of the next one."""
    names = {"__name__": "page"} if names is None else names
    exec(compile(source, "page", "exec"), names)
    return names


@pytest.fixture
def newcomer(tmp_path, monkeypatch):
    """A folder in which paths of the repository are found and nothing is written to it."""
    (tmp_path / "hf_fedmoe").symlink_to(REPOSITORY / "hf_fedmoe")
    monkeypatch.chdir(tmp_path)


def run_trainer_page(rounds: int, sizes: dict[str, str] | None = None) -> dict:
    """Its blocks, with other sizes in the place of those that stand there when they are given."""
    train, load, images, adapters = blocks("docs/trainer.md")
    assert "rounds=5" in train
    for large, small in (sizes or {}).items():
        assert large in train
        train = train.replace(large, small)
    names = run(train.replace("rounds=5", f"rounds={rounds}"))
    assert names["trainer"].state.global_step == rounds
    of_images = run(images.replace("rounds=5", f"rounds={rounds}"))
    assert of_images["trainer"].state.global_step == rounds
    classify = pipeline("image-classification", model="runs/digits/model")
    assert classify(load_source("digits")["test"][0]["image"])[0]["label"] in of_images["images"].label_names
    loaded = run(load)
    assert_equal_states(state(loaded["classify"].model), state(names["trainer"].model))
    of_adapters = run(adapters.replace("rounds=2", f"rounds={rounds}"), {**names, "pipeline": pipeline})
    assert Path("runs/adapters/model/model.safetensors").stat().st_size < 400_000
    mixture, inputs = of_adapters["classify"].model, names["tokenizer"]("A fine dress.", return_tensors="pt")
    with torch.no_grad():
        expert_logits = mixture(**inputs, output_expert_logits=True).expert_logits
        torch.testing.assert_close(of_adapters["first"].eval()(**inputs).logits, expert_logits[:, 1])
    assert Path("runs/example/model/README.md").read_text().startswith("---\nlibrary_name: transformers")
    return names


def test_comparison_of_the_docs(newcomer, warm_processes):
    (comparison,) = blocks("docs/methods.md", "yaml")
    Path("digits.yaml").write_text(comparison)
    table = compare("digits.yaml", seeds=[0], rows=["FedProx, mu 1", "pFedMM", "Fed-MoE"], overrides={"rounds": 1})
    heading, _, fedprox, pfedmm, fedmoe = table.split("\n")
    assert heading.count("|") == 9 and "bottom decile" in heading and pfedmm.count("  ") == 0
    assert fedprox.startswith("| FedProx, mu 1 |") and fedmoe.endswith("|  |")
    assert Path("runs/compare/digits/table.md").read_text() == table + "\n"


def test_trainer_page_in_one_round(newcomer):
    sizes = {"examples_per_client=100": "examples_per_client=20", "reserved_size=200": "reserved_size=40"}
    run_trainer_page(rounds=1, sizes=sizes | {"range(500)": "range(40)"})


@pytest.mark.slow
def test_trainer_page_as_it_stands(newcomer):
    names = run_trainer_page(rounds=5)
    assert names["trainer"].evaluate(names["data"].test)["eval_accuracy"] > 0.4


def test_private_run_of_the_docs(newcomer):
    private, _ = blocks("docs/privacy.md")
    assert "rounds=10" in private
    names = run(private.replace("rounds=10", "rounds=2"))
    epsilons = [entry["epsilon"] for entry in names["trainer"].state.log_history if "epsilon" in entry]
    assert len(epsilons) == 2 and 7.9 < epsilons[1] <= 8.0
    assert "(8, 0.001)-differentially private" in Path("runs/private/README.md").read_text()


def test_run_that_hides_examples_of_the_docs(newcomer):
    pytest.importorskip("opacus", reason="example-level privacy is by Opacus: pip install 'hf_fedmoe[test]'")
    _, hidden = blocks("docs/privacy.md")
    names = run(hidden)
    epsilons = [entry["example_epsilon"] for entry in names["trainer"].state.log_history if "example_epsilon" in entry]
    assert len(epsilons) == 5 and 1 < epsilons[0] < epsilons[4] <= 8.0
    assert (
        "differentially private for adding or leaving out one of its"
        in Path("runs/hidden_examples/README.md").read_text()
    )
    assert names["trainer"].evaluate(names["data"].test)["eval_accuracy"] > 0.4


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", *PAGES])
def test_pages_name_files_that_exist(page):
    text = (REPOSITORY / page).read_text()
    for link in re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", text):
        assert ((REPOSITORY / page).parent / link).exists(), link
    for folder in re.findall(r"`(hf_fedmoe/\w+)`", text):
        assert (REPOSITORY / folder).is_dir(), folder


def test_readme_is_short_and_has_its_commands():
    text = (REPOSITORY / "README.md").read_text()
    assert "accelerate launch recipes/yelp_gpt2.py" in text and text.count("\n") <= 140
    assert text.index("<!-- results:begin -->") < text.index("<!-- results:end -->")


def test_differences_of_clients_in_the_docs(newcomer):
    (diagnosis,) = blocks("docs/which_method.md")
    found = run(diagnosis)["found"]
    # Reviews are the same everywhere: only the proportions of stars differ.
    assert found.num_groups == 1 and found.label_skew > 0.2 and "one model for all is right" in str(found)


def test_protocol_of_the_docs(newcomer):
    (who_asks,) = blocks("docs/protocol.md")
    prior = run(who_asks)["prior"]
    # Experts that are still equal suit anybody as well as the gate says.
    assert prior.shape == (4,) and prior.sum().item() == pytest.approx(1)


def test_language_models_of_the_docs(newcomer):
    owner, mixture, later, _, out = blocks("docs/language_models.md")
    assert ", 60  # any decoder" in owner
    names = run(owner.replace(", 60  # any decoder", ", 2  # any decoder"))
    run(mixture, names)
    model, inputs = names["mixture"], names["inputs"]
    assert model.config.owners == [
        {"name": "plays", "licence": "public domain"},
        {"name": "code", "licence": "PSF-2.0"},
    ]
    # Code is known for code, plays for plays.
    assert model.route(**inputs)[0, -1].argmax() == 2
    assert model.route(**names["tokenizer"](names["plays"][:300], return_tensors="pt"))[0, -1].argmax() == 1
    assert Path("runs/owners/mixture/model.safetensors").stat().st_size < 1_500_000
    run(later, names)
    with torch.no_grad():
        expected = model(**inputs).logits
        assert torch.equal(names["write"].model(**inputs).logits, expected)
        run(out, names)
        again = PeftModel.from_pretrained(names["alone"].from_pretrained(names["BASE"]), "runs/owners/code-again")
        torch.testing.assert_close(again(**inputs).logits, model(**inputs, expert="code").logits)
        assert names["fewer"].config.expert_names == ["base", "plays"]


def test_owners_in_rounds_of_the_docs(newcomer):
    _, _, _, rounds, _ = blocks("docs/language_models.md")
    # A few rows for each, in fewer rounds of theirs.
    for large, small in (("[:20]", "[:1]"), ("[20:]", "[20:21]"), ("[:10]", "[:1]"), ("[-2:]", "[-1:]")):
        assert large in rounds
        rounds = rounds.replace(large, small)
    names = run(rounds.replace("rounds=2", "rounds=1"))
    model = FedMoEForCausalLM.from_pretrained("runs/owners-in-rounds/model")
    assert model.config.router_names == ["base", "plays", "code"]
    assert_equal_states(state(model), state(names["model"]))
    assert names["trainer"].rounds[0].metrics == {"owner_0_clients": 2.0, "owner_1_clients": 1.0}


def test_commands_of_language_models_in_the_docs(newcomer, capsys):
    train, merge, remove = blocks("docs/language_models.md", "bash")
    texts = {owner: [] for owner in ("plays", "code", "public")}
    for row in pq.read_table("hf_fedmoe/assets/owners/texts.parquet").to_pylist():
        if row["owner"] in texts and row["split"] == "train":
            texts[row["owner"]].append(row["text"])
    for owner, documents in texts.items():
        Path(f"{owner}.txt").write_text("\n".join(documents)[:20_000])
    assert "--max_steps 40" in train
    train = train.replace("--max_steps 40", "--max_steps 2 --disable_tqdm --use_cpu")
    for command in (train, train.replace("plays", "code").replace("public domain", "PSF-2.0"), merge, remove):
        program, *words = shlex.split(command.replace("\\\n", " "))
        assert program == "hf-fedmoe"
        run_command(words)
    said = capsys.readouterr().out.splitlines()
    assert said[-2:] == [
        "runs/experts/mixture: a mixture of base, plays, code",
        "runs/experts/fewer: a mixture of base, plays",
    ]
    tokenizer = AutoTokenizer.from_pretrained("runs/experts/mixture")
    model = FedMoEForCausalLM.from_pretrained("runs/experts/mixture")
    for owner, name in enumerate(("base", "plays", "code")):
        text = "public" if name == "base" else name
        inputs = tokenizer(Path(f"{text}.txt").read_text()[1000:1400], return_tensors="pt")
        assert model.route(**inputs)[0, -1].argmax() == owner


def test_words_that_an_upload_gives_away(newcomer, capsys):
    (curious,) = blocks("docs/trust.md")
    names = run(curious)
    assert names["found"] == {}  # of adapters
    assert "\n419 tokens, 419 of them found, 0 others found\n" in "\n" + capsys.readouterr().out
    assert "`419 tokens, 419 of them found, 0 others found`" in (REPOSITORY / "docs/trust.md").read_text()


def test_method_of_the_docs(newcomer, tmp_path):
    method, use, median, weights, feddyn, by_client, own = blocks("docs/strategies.md")
    names = run(method)
    momentum = names["FedAvgMomentum"]
    run(use, names)
    assert [entry["velocity_norm"] > 0 for entry in names["trainer"].state.log_history if "loss" in entry] == [
        True
    ] * 2

    run(weights, names)
    assert len(names["weighted"].rounds) == 2 and not any(report.refused for report in names["weighted"].rounds)

    run(by_client, names)
    assert {"clients_worst", "clients_unseen_accuracy"} <= names["metrics"].keys()
    assert Path("runs/fedrep/clients.svg").is_file() and len(names["trainer"].client_table) == 3

    run(own, names)
    loaded = type(names["own"]).from_pretrained("runs/fedrep/client-0")
    assert_equal_states(state(loaded), state(names["own"]))
    assert not torch.equal(names["own"].score.weight, names["theirs"].score.weight)

    def trained(strategy, folder, resume=None, **changes):
        args = tiny_args(tmp_path / folder, save_strategy="steps", **changes)
        trainer = FederatedTrainer(tiny_expert(), args, tiny_federation(), strategy=strategy)
        trainer.train(resume_from_checkpoint=resume)
        return state(trainer.model)

    plain = trained(FedAvg(), "plain")
    run(median, names)
    server = SimpleNamespace(
        bank_SP=torch.zeros(1, 1),
        layout=SimpleNamespace(views=lambda row_P: {"w": row_P}),
        worker=SimpleNamespace(named_parameters=lambda: [("w", None)]),
    )
    rows_mP = torch.tensor([[10.0], [1.0], [2.0]])
    for accuracies, middle in (((0.5, 0.5, 0.5), 2.0), ((0.9, 0.2, 0.2), 10.0), ((0.0, 0.9, 0.1), 1.0)):
        uploads = SimpleNamespace(
            probed=list(torch.tensor(accuracies)), rows_mP=rows_mP, average_into_=lambda told: {}
        )
        told = names["WeightedMedian"]().update(server, uploads, None)
        assert server.bank_SP.item() == middle and told["best_client"] == pytest.approx(max(accuracies))
    # Of one client the median is its model, and so is the mean.
    alone = [
        trained(strategy, strategy.name, clients_per_round=1) for strategy in (names["WeightedMedian"](), FedAvg())
    ]
    assert_equal_states(*alone)
    assert not torch.allclose(
        trained(names["WeightedMedian"](), "of all")["classifier.weight"], plain["classifier.weight"]
    )
    run(feddyn, names)
    assert_equal_states(trained(names["FedDyn"](0.0, 0.0), "static"), plain, atol=1e-6, rtol=0)
    dynamic = trained(names["FedDyn"](), "dynamic")
    assert not torch.allclose(dynamic["classifier.weight"], plain["classifier.weight"], atol=1e-4)
    assert_equal_states(trained(momentum(0.0), "none"), plain)
    heavy = trained(momentum(0.5), "heavy")
    assert not torch.allclose(heavy["classifier.weight"], plain["classifier.weight"], atol=1e-4)
    resumed = trained(momentum(0.5), "heavy", resume=str(tmp_path / "heavy" / "checkpoint-2"))
    assert_equal_states(resumed, heavy)
