import html
import re
from importlib.resources import files

import numpy as np
import pytest
from huggingface_hub import ModelCard
from peft import LoraConfig

from hf_fedmoe.models import (
    CharLSTMConfig,
    CharLSTMForSequenceClassification,
    FedMoEForImageClassification,
    FedMoEForSequenceClassification,
    LinearConfig,
    LinearForClassification,
)
from hf_fedmoe.reporting import RunFacts, write_model_card
from hf_fedmoe.training import FederatedTrainer, FedMoETrainer
from hf_fedmoe.training.adapters import add_adapter
from tests.tiny_federation import tiny_args, tiny_expert, tiny_federation, tiny_mixture
from tests.tiny_images import tiny_cnn, tiny_resnet


def facts(**changes) -> RunFacts:
    known = dict(
        method="fedmoe",
        settings={"preset": "default", "fusion_rate": 0.3},
        local={"learning_rate": 6e-4},
        clients_per_round=2,
        client_sizes_M=np.array([10, 12, 8]),
        reserved_size=24,
        rounds=5,
        chosen_round=4,
        bytes_up=1_500_000,
        bytes_down=3_000_000_000,
        counted_rounds=5,
        participations_M=np.array([4, 3, 3]),
        evaluations={"test": {"accuracy": 0.61234, "macro_f1": 0.5, "loss": 1.25, "runtime": 3.0}},
    )
    return RunFacts(**known | changes)


def row(card: ModelCard, name: str) -> list[str]:
    (line,) = [line for line in card.text.splitlines() if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_metadata_of_the_hub(tmp_path):
    write_model_card(
        tmp_path / "reviews-moe",
        tiny_mixture(),
        facts(),
        model_id="user/reviews-moe",
        license="cc0-1.0",
        language="en",
        tags="toy",
        base_model="openai-community/gpt2",
        dataset="Toy reviews",
        dataset_id="user/toy",
    )
    data = ModelCard.load(tmp_path / "reviews-moe" / "README.md").data
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-classification")
    assert {"fedmoe", "federated-learning", "mixture-of-experts", "toy"} <= set(data.tags)
    assert (data.license, data.language, data.base_model) == ("cc0-1.0", "en", "openai-community/gpt2")
    assert (data.model_name, data.datasets, data.metrics) == ("reviews-moe", ["user/toy"], ["accuracy", "f1", "loss"])
    results = {result.metric_name: result for result in data.eval_results}
    assert {name: result.metric_value for name, result in results.items()} == {
        "Accuracy": 0.6123,
        "Macro-F1": 0.5,
        "Loss": 1.25,
    }
    assert results["Macro-F1"].metric_type == "f1"
    assert {(r.dataset_type, r.dataset_name, r.dataset_split) for r in results.values()} == {
        ("user/toy", "Toy reviews", "test")
    }


def test_text_tells_make_up_training_and_how_to_load(tmp_path):
    model = tiny_mixture(num_routed_experts=3, top_l=2)
    card = write_model_card(tmp_path, model, facts(), model_id="user/moe")
    size = sum(parameter.numel() for parameter in tiny_expert().parameters())
    assert row(card, "Main experts") == ["1"] and row(card, "Routed experts (K)") == ["3"]
    assert row(card, "Each expert") == [f"BertForSequenceClassification, {size:,} parameters"]
    assert row(card, "Gate") == ["linear, on the main expert's pooled features"]
    assert row(card, "Weight of the routed part (alpha)") == ["0.500"]
    assert row(card, "Routed experts run per example (top-L)") == ["2"]
    assert row(card, "Method") == ["`fedmoe`"] and row(card, "fusion_rate") == ["0.3"]
    assert row(card, "Rounds") == ["5, the model of round 4 kept"]
    assert row(card, "Clients") == ["3, 2 in each round"] and row(card, "Examples of a client") == ["8 to 12"]
    assert row(card, "Reserved set of the server") == ["24 labelled examples"]
    assert row(card, "Clients to server") == ["1.5 MB"] and row(card, "Server to clients") == ["3,000.0 MB"]
    assert row(card, "test") == ["0.6123", "0.5000", "1.2500"]
    assert row(card, "1") == ["12", "3"]  # client 1: examples, rounds
    assert 'model="user/moe", trust_remote_code=True' in card.text
    assert card.data.eval_results is None and card.data.base_model is None  # nothing is made up


def code_blocks(card: ModelCard) -> list[str]:
    return [part.partition("```")[0] for part in card.text.split("```python\n")[1:]]


def test_text_models_are_shown_a_sentence(tmp_path):
    mixture = write_model_card(tmp_path, tiny_mixture(), facts(), model_id="user/moe", dataset="Toy")
    assert mixture.data.tags == ["fedmoe", "mixture-of-experts", "federated-learning", "text-classification"]
    assert {result.task_type for result in mixture.data.eval_results} == {"text-classification"}
    assert "\nA Mixture-of-Experts for text classification, put together by federated learning." in mixture.text
    assert "image" not in mixture.content
    plain = write_model_card(tmp_path, tiny_expert(), model_id="user/plain")
    assert "\nA text classifier, trained by federated learning:" in plain.text
    assert code_blocks(plain) == [
        "from transformers import pipeline\n\n"
        'classify = pipeline("text-classification", model="user/plain")\n'
        'print(classify("A sentence to classify."))\n'
    ]


def test_image_models_are_shown_an_image(tmp_path):
    model = FedMoEForImageClassification.from_expert(tiny_cnn(num_channels=1))
    card = write_model_card(tmp_path, model, facts(), model_id="user/moe", dataset="Toy digits", tags="toy")
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.pipeline_tag == "image-classification"
    assert data.tags == ["fedmoe", "mixture-of-experts", "federated-learning", "image-classification", "toy"]
    assert {result.task_type for result in data.eval_results} == {"image-classification"}
    assert "\nA Mixture-of-Experts for image classification, put together by federated learning." in card.text
    assert row(card, "Each expert")[0].startswith("SmallCNNForImageClassification, ")
    assert code_blocks(card)[1] == (
        "from transformers import pipeline\n\n"
        'classify = pipeline("image-classification", model="user/moe", trust_remote_code=True)\n'
        'print(classify("image.png"))\n'
    )
    for word in ("text-classification", "text classif", "sentence"):
        assert word not in card.content


def test_an_architecture_of_this_package_needs_its_code_without_a_mixture_too(tmp_path):
    card = write_model_card(tmp_path, tiny_resnet(), facts(method="fedavg"), model_id="user/plain")
    assert "\nAn image classifier, trained by federated learning:" in card.text
    with_package, without = code_blocks(card)
    assert "import hf_fedmoe" in with_package and "trust_remote_code=True" in without
    assert "fedmoe" not in card.data.tags and "gate" not in card.text


def test_gate_contributions_and_comparison(tmp_path):
    share_KC = np.array([[0.75, 0.25, 0.5], [0.25, 0.75, 0.5]])
    contribution_SM = np.array([[0.2, 0.5, 0.3], [0.9, 0.05, 0.05], [0.0, 0.4, 0.6]])
    comparison = {"fedavg": {"accuracy": 0.5, "macro_f1": 0.25}, "fedmoe": {"accuracy": 0.75, "macro_f1": 0.5}}
    card = write_model_card(
        tmp_path,
        tiny_mixture(),
        facts(contribution_SM=contribution_SM),
        comparison=comparison,
        gate_share_KC=share_KC,
    )
    assert row(card, "routed expert 0") == ["0.75", "0.25", "0.50"]
    assert row(card, "client 0") == ["0.20", "0.90", "0.00"]
    assert row(card, "fedavg") == ["0.5000", "0.2500"]
    with pytest.raises(ValueError, match=r"`gate_share_KC` has shape \(3, 2\)"):
        write_model_card(tmp_path, tiny_mixture(), facts(), gate_share_KC=share_KC.T)
    with pytest.raises(ValueError, match=r"`contribution_SM` has shape \(2, 3\), but .* need \(3, 3\)"):
        write_model_card(tmp_path, tiny_mixture(), facts(contribution_SM=contribution_SM[:2]))
    with pytest.raises(ValueError, match="has neither gate nor experts"):
        write_model_card(tmp_path, tiny_expert(), facts(), gate_share_KC=share_KC)


def test_many_clients_are_summed_up_and_unknown_rounds_are_said(tmp_path):
    named = facts(contribution_SM=np.full((3, 3), 1 / 3), client_names=["north", "a | b", "south"])
    card = write_model_card(tmp_path, tiny_mixture(), named)
    assert row(card, "north") == ["10", "4"] and row(card, "client south") == ["0.33"] * 3
    assert "| client a &#124; b |" in card.text
    many = facts(client_sizes_M=np.full(100, 7), participations_M=np.arange(100) % 3, counted_rounds=3)
    card = write_model_card(tmp_path, tiny_mixture(), many)
    assert "66 of 100 clients took part, 0 to 2 times." in card.text
    assert row(card, "Examples of a client") == ["7"]
    assert row(card, "Clients to server") == ["1.5 MB in 3 of 5 rounds"]


def test_base_model_is_a_hub_id_and_never_a_folder(tmp_path):
    model = tiny_mixture()
    for name, expected in (("user/small-bert", "user/small-bert"), (str(tmp_path), None), ("/no/such/folder", None)):
        model.config.expert_config._name_or_path = name
        assert write_model_card(tmp_path, model).data.base_model == expected


def test_a_trainer_reports_its_own_run(tmp_path):
    trainer = FedMoETrainer(
        tiny_mixture(),
        tiny_args(tmp_path / "run", eval_strategy="steps", eval_steps=1, logging_steps=3),
        train_dataset=tiny_federation(),
    )
    trainer.train()
    trainer.create_model_card()
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert "## Evaluation" not in card.text  # evaluations during the run are of earlier models
    scores = trainer.evaluate()
    # What `push_to_hub` may pass on of the arguments of transformers.
    trainer.create_model_card(tasks="text-classification", dataset=["toy rows"], folder=tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"`dataset_tags` is \['a/b', 'c/d'\]: a card is that of one data set, give"):
        trainer.create_model_card(dataset_tags=["a/b", "c/d"])
    card = ModelCard.load(tmp_path / "elsewhere" / "README.md")
    size = sum(parameter.numel() for parameter in tiny_expert().parameters())
    assert row(card, "Clients to server") == [f"{3 * 2 * 4 * size / 1e6:,.1f} MB"]  # logged once in three rounds
    assert row(card, "validation")[0] == f"{scores['eval_accuracy']:.4f}"
    drawn = [client for report in trainer.rounds for client in report.clients]
    assert [row(card, str(client)) for client in range(4)] == [["12", str(drawn.count(client))] for client in range(4)]
    assert row(card, "correlation") == ["relevance"]
    shares = np.array([row(card, f"client {client}") for client in range(4)], dtype=float)
    np.testing.assert_allclose(shares.sum(0), 1, atol=0.02)  # of an expert; warmed up, nothing of the start is left
    last = trainer.rounds[-1].clients  # the main expert is the mean of the last round
    np.testing.assert_allclose(shares[:, 0], [client in last for client in range(4)] / np.float64(2))


def test_contributions_are_left_out_when_an_earlier_round_is_kept(tmp_path):
    args = tiny_args(
        tmp_path,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # the worst round, which is not the last
    )
    trainer = FedMoETrainer(tiny_mixture(), args, train_dataset=tiny_federation())
    trainer.train()
    trainer.create_model_card()
    card = ModelCard.load(tmp_path / "README.md")
    assert trainer.state.best_global_step < 3
    assert row(card, "Rounds") == [f"3, the model of round {trainer.state.best_global_step} kept"]
    assert "client 0" not in card.text


def test_a_resumed_run_counts_the_rounds_before(tmp_path):
    for rounds, resume in ((2, None), (3, True)):
        args = tiny_args(tmp_path, rounds=rounds, save_strategy="steps")
        trainer = FederatedTrainer(tiny_expert(), args, tiny_federation())
        trainer.train(resume_from_checkpoint=resume)
    trainer.create_model_card(model_name="plain")
    card = ModelCard.load(tmp_path / "README.md")
    size = sum(parameter.numel() for parameter in tiny_expert().parameters())
    assert row(card, "Server to clients") == [f"{3 * 2 * 4 * size / 1e6:,.1f} MB"]
    assert "How often each client took part" not in card.text  # known for the last round only
    assert "fedmoe" not in card.data.tags and "trust_remote_code" not in card.text
    assert row(card, "Reserved set of the server") == ["none used"]


def test_the_template_is_part_of_the_package():
    assert (files("hf_fedmoe") / "reporting" / "model_card_template.md").is_file()


@pytest.mark.parametrize("kind", ["mixture", "characters", "vectors"])
def test_models_without_a_pipeline_are_shown_as_they_are_used(kind, tmp_path, capsys):
    sizes = {"hidden_size": 8, "num_labels": 100}
    model = LinearForClassification(LinearConfig(num_features=7))
    if kind != "vectors":
        model = CharLSTMForSequenceClassification(CharLSTMConfig(**sizes)).eval()
    if kind == "mixture":
        model = FedMoEForSequenceClassification.from_expert(model, num_routed_experts=2)
    model.save_pretrained(tmp_path)
    card = write_model_card(tmp_path, model, model_id=str(tmp_path))
    task, reads = ("tabular", "vector") if kind == "vectors" else ("text", "character")
    assert card.data.pipeline_tag == f"{task}-classification" and f"{reads} classifi" in card.text
    with_package, without = code_blocks(card)
    assert "pipeline(" not in card.text and "trust_remote_code=True" in without
    assert ("`model.config.top_l` changes L" in card.text) == (kind == "mixture")
    names = {}
    exec(with_package, names)
    assert type(names["model"]) is type(model)
    # The package is here: what is registered comes before a checkpoint's own files.
    exec(without.replace(", trust_remote_code=True", ""), {})
    printed = capsys.readouterr().out.strip()
    assert printed.startswith("tensor([[") if kind == "vectors" else printed in model.config.label2id


def test_classes_without_examples_are_left_out(tmp_path):
    model = tiny_mixture(num_routed_experts=2)
    share_KC = np.array([[0.25, np.nan, 0.5], [0.75, np.nan, 0.5]])
    card = write_model_card(tmp_path, model, gate_share_KC=share_KC)
    names = [model.config.id2label[label] for label in (0, 2)]
    assert f"|  | {names[0]} | {names[1]} |" in card.text
    assert row(card, "routed expert 1") == ["0.75", "0.50"]


@pytest.mark.parametrize("gate", ["main_features", "adapter"])
def test_a_mixture_of_adapters_says_so(tmp_path, gate):
    model = tiny_mixture(gate=gate, peft_config=LoraConfig(r=4))
    card = str(write_model_card(tmp_path, model))
    assert "loading it needs the package `peft`" in card
    assert "LORA adapter of one BertForSequenceClassification, with a head, 563 parameters" in card
    assert "| Base of the adapters | saved with them |" in card
    assert ("an adapter of the same base" in card) == (gate == "adapter")
    assert "peft" not in str(write_model_card(tmp_path, tiny_mixture()))


def test_the_card_of_an_adapter_tells_its_base_the_labels(tmp_path):
    model = add_adapter(tiny_expert(id2label={0: "bad", 1: "fair", 2: "good"}), LoraConfig(r=4))
    model.save_pretrained(tmp_path)
    card = write_model_card(tmp_path, model)
    assert card.data.library_name == "peft"
    [code] = re.findall(r"```python\n(.*?)```", str(card), re.DOTALL)
    assert "id2label={0: 'bad', 1: 'fair', 2: 'good'}" in code
    tiny_expert().save_pretrained(tmp_path / "base")
    names = {}
    exec(code.replace("<base>", str(tmp_path / "base")).replace(f"<user>/{tmp_path.name}", str(tmp_path)), names)
    assert names["model"].config.id2label[1] == "fair"


NASTY = [
    "<script>alert(1)</script>",
    "<!-- hidden",
    "a | b",
    "two\nlines\n---\nlicense: mit",
    "---",
    "key: value # comment",
    "`code` ```",
    "*bold* _it_ ~~gone~~ a_b",
    "[link](http://x.y) ![image](x)",
    "{{ jinja }} {% if %}",
    "\"double\" 'single' \\",
    "# heading",
    "- item & more; $x$ $$y$$",
    "ünï \u202e",
]


def shown(text: str) -> str:
    """Returns what a reader sees of a piece of the card: numbers of characters as these."""
    return html.unescape(text).strip()


def one_line(name: str) -> str:
    return " ".join(name.split())


@pytest.mark.parametrize("name", NASTY)
def test_names_of_any_kind_stay_text(tmp_path, name):
    """Markdown of labels, methods, settings, data sets and models; and the metadata comes back as it was."""
    labels = {0: name, 1: "plain", 2: f"{name} again"}
    model = tiny_mixture(num_routed_experts=2, id2label=labels)
    write_model_card(
        tmp_path,
        model,
        facts(method=name, settings={name: name}, local={name: name}),
        model_name=name,
        model_id=f"user/{name}",
        dataset=name,
        tags=name,
        comparison={name: {"accuracy": 0.5}},
        gate_share_KC=np.full((2, 3), 0.5),
    )
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.model_name == name and card.data.tags[-1] == name
    assert {result.dataset_name for result in card.data.eval_results} == {name}
    assert card.data.license is None and card.data.library_name == "transformers"
    outside = re.sub(r"```.*?\n```", "", card.text, flags=re.DOTALL)
    assert not re.search(r"<(?!user>)|\]\(|\*\*|~~|\$", outside)
    lines = [line for line in card.text.splitlines() if line]
    assert shown(lines[0]) == f"# {one_line(name)}"
    assert shown(next(line for line in lines if line.startswith("Labels: "))).startswith(
        f"Labels: {one_line(name)}, plain, {one_line(name)} again. Data: {one_line(name)}."
    )
    tables = [line.strip("|").split("|") for line in lines if line.startswith("|")]
    cells = [[shown(cell) for cell in row] for row in tables]
    assert ["", one_line(name), "plain", f"{one_line(name)} again"] in cells  # the classes of the gate
    assert [one_line(name), one_line(name)] in cells and [one_line(name), "0.5000"] in cells
    blocks = code_blocks(card)
    assert len(blocks) == 2 and re.search(r"^classify = pipeline\(.*model=(\".*\"), trust", blocks[1], re.MULTILINE)
    for block in blocks:
        compile(block, "card", "exec")
    [model_id] = re.findall(r'model=("(?:[^"\\]|\\.)*")\)$', blocks[0], re.MULTILINE)
    assert eval(model_id) == f"user/{name}"


def test_names_that_mean_nothing_to_markdown_are_written_as_they_are(tmp_path):
    labels = {0: "very_good", 1: "5 stars", 2: "so-so (3.5)"}
    card = write_model_card(tmp_path, tiny_mixture(id2label=labels), facts(method="my_method"))
    assert "Labels: very_good, 5 stars, so-so (3.5)." in card.text
    assert row(card, "Method") == ["`my_method`"]


@pytest.mark.parametrize("name", NASTY)
def test_code_for_adapters_names_their_labels(tmp_path, name):
    model = add_adapter(tiny_expert(id2label={0: name, 1: "b", 2: "c"}), LoraConfig(r=2))
    card = write_model_card(tmp_path, model, model_name="plain")
    [code] = code_blocks(card)
    [literal] = re.findall(r"id2label=(\{.*\}), ignore_mismatched_sizes=True$", code, re.MULTILINE)
    assert eval(literal) == {0: name, 1: "b", 2: "c"}
