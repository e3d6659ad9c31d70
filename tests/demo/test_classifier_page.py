"""The page of a mixture of classifiers: its sentences, and each of its controls in a browser."""

import numpy as np
import pytest
import torch
from PIL import Image

from hf_fedmoe.demo import explain, load_shown
from hf_fedmoe.models import FedMoEForImageClassification, FedMoEForSequenceClassification
from hf_fedmoe.reporting import ExpertFacts, write_expert_facts
from tests.demo.browser import need_a_browser, opened
from tests.tiny_images import tiny_cnn, tiny_processor
from tests.tiny_models import make_different, tiny_bert
from tests.tiny_tokenizer import tiny_tokenizer


TEXT = "w3 w9 w20 w11"
NAMES = ["main expert", "routed expert 0", "routed expert 1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run's folder with a mixture in it whose experts disagree."""
    run = tmp_path_factory.mktemp("runs") / "mine"
    expert = tiny_bert(3, id2label={0: "bad", 1: "fair", 2: "good"}, label2id={"bad": 0, "fair": 1, "good": 2})
    model = FedMoEForSequenceClassification.from_expert(expert, num_routed_experts=2, pad_token_id=1)
    make_different(model, 0.5).save_pretrained(run / "model")
    tiny_tokenizer().save_pretrained(run / "model")
    contribution, share = [[0.25, 0.75], [1.0, 0.0], [0.5, 0.5]], [[0.875], [0.125]]
    write_expert_facts(run / "model", ExpertFacts(["hill", "dale"], contribution, ["bad"], share))
    return run


def test_a_run_is_loaded_with_its_facts(folder):
    shown = load_shown(str(folder))
    assert shown.name == "mine" and not shown.reads_images and shown.facts.clients == ["hill", "dale"]
    encoded = tiny_tokenizer()(TEXT, return_tensors="pt")
    assert torch.equal(shown.inputs(TEXT)["input_ids"], encoded["input_ids"])
    for nothing in (None, "", " \n"):
        with pytest.raises(ValueError, match="There is nothing to read: give a text"):
            shown.inputs(nothing)


def test_what_changes_is_a_sentence(folder):
    pytest.importorskip("gradio")
    from hf_fedmoe.demo.classifier_page import change_of, table_of

    shown = load_shown(str(folder))
    full = explain(shown.model, shown.inputs(TEXT), [True] * 3)
    less = explain(shown.model, shown.inputs(TEXT), [False, True, True])
    classes = ["<b>", "fair", "good"]
    assert change_of(full, full, classes, []) == "All experts are on: this is the model's own answer."
    told = change_of(full, less, classes, ["main expert"])
    before, after = full.probabilities_C.max(), less.probabilities_C.max()
    moved = (full.probabilities_C - less.probabilities_C).abs().max()
    assert f" at {before:.3f}. Without main expert: " in told and f" at {after:.3f}. " in told and "<b>" not in told
    assert told.endswith(f"moves by {moved:.3f}.")
    rows = table_of(less, NAMES, NAMES[1:])
    assert rows[0][:2] == ["main expert", "off"]
    assert rows[1][2:] == [f"{p:.3f}" for p in less.experts_SC[1]]


@pytest.mark.slow
def test_each_control_in_a_browser(folder):
    need_a_browser()
    shown = load_shown(str(folder))
    full = explain(shown.model, shown.inputs(TEXT), [True] * 3)
    less = explain(shown.model, shown.inputs(TEXT), [False, True, True])
    with opened(str(folder), 7871) as page:
        page.get_by_role("button", name="Ask").click()
        page.get_by_text("There is nothing to read: give a text.").wait_for()
        page.get_by_label("Text").fill(TEXT)
        page.get_by_role("button", name="Ask").click()
        page.get_by_text("All experts are on: this is the model's own answer.").wait_for()
        for label, p in zip(("bad", "fair", "good"), full.probabilities_C, strict=True):
            assert f"{100 * p:.0f}%" in page.get_by_test_id(f"{label}-confidence-set").inner_text()
        for k in range(2):
            told = page.get_by_test_id(f"routed expert {k}-confidence-set").inner_text()
            assert f"{100 * full.gate_K[k]:.0f}%" in told
        assert f"{full.experts_SC[2, 1]:.3f}" in page.locator("#table").inner_text()
        assert "hill" in page.locator("#contributions").inner_text()
        assert "0.88" in page.locator("#gate_by_class").inner_text()
        page.get_by_role("checkbox", name="main expert").click()
        page.get_by_text("Without main expert: ").wait_for()
        assert f"{less.probabilities_C.max():.3f}" in page.locator("#change").inner_text()
        assert "off" in page.locator("#table").inner_text()
        page.get_by_role("checkbox", name="routed expert 0").click()
        page.get_by_text("Without main expert, routed expert 0: ").wait_for()
        assert "100%" in page.get_by_test_id("routed expert 1-confidence-set").inner_text()
        page.get_by_role("checkbox", name="routed expert 1").click()
        page.get_by_text("All experts are switched off, and nobody is left to answer").wait_for()
        page.get_by_role("checkbox", name="main expert").click()
        page.get_by_text("Without routed expert 0, routed expert 1: ").wait_for()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    model = FedMoEForImageClassification.from_expert(tiny_cnn(3), num_routed_experts=2)
    make_different(model, 0.3).save_pretrained(folder / "model")
    tiny_processor().save_pretrained(folder / "model")
    pixels = np.random.default_rng(0).integers(255, size=(8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "one.png")
    Image.fromarray(np.full((8, 8), 60_000, dtype=np.uint16)).save(folder / "deep.png")
    return folder


def test_images_are_read_as_they_are(images):
    shown = load_shown(str(images))
    assert shown.reads_images and shown.facts is None
    found = explain(shown.model, shown.inputs(str(images / "one.png")), [True] * 3)
    with torch.no_grad():
        own = shown.model(**tiny_processor()(Image.open(images / "one.png"), return_tensors="pt"))
    assert torch.equal(found.probabilities_C, own.logits[0].softmax(-1))
    with pytest.raises(ValueError, match="more than 8 bits a channel"):
        shown.inputs(str(images / "deep.png"))
    with pytest.raises(ValueError, match="There is nothing to read: give an image"):
        shown.inputs(None)


@pytest.mark.slow
def test_an_image_is_dropped_in_a_browser(images):
    need_a_browser()
    shown = load_shown(str(images))
    full = explain(shown.model, shown.inputs(str(images / "one.png")), [True] * 3)
    with opened(str(images), 7872) as page:
        page.locator("input[type=file]").first.set_input_files(images / "one.png")
        page.get_by_text("All experts are on: this is the model's own answer.").wait_for()
        assert f"{full.experts_SC[0, 0]:.3f}" in page.locator("#table").inner_text()
        page.get_by_role("checkbox", name="routed expert 1").click()
        page.get_by_text("Without routed expert 1: ").wait_for()
