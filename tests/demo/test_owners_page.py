"""Continuations by owners of text: by the model's own `generate` and `route`, and on the page in a browser."""

import pytest
import torch

from hf_fedmoe.demo import Continuation, continue_text, load_shown
from tests.demo.browser import need_a_browser, opened
from tests.tiny_decoders import tiny_mixture
from tests.tiny_owners import text_of
from tests.tiny_tokenizer import tiny_tokenizer


PROMPT = text_of("court", 6)
OWNERS = ["court", "press"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A mixture of two owners whose experts are random, and of whose text the router knows."""
    folder = tmp_path_factory.mktemp("owners")
    tiny_mixture("gpt2", OWNERS).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def shown(folder):
    return load_shown(str(folder))


def test_a_greedy_continuation_is_the_models_own(shown):
    found = continue_text(shown.model, shown.tokenizer, PROMPT, OWNERS, 5, None)
    encoded = shown.tokenizer(PROMPT, return_tensors="pt")
    ids = shown.model.generate(
        input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"], max_new_tokens=5, do_sample=False
    )
    assert found.tokens == [shown.tokenizer.decode([token]) for token in ids[0].tolist()]
    assert found.prompt_length == encoded["input_ids"].shape[1] and len(found.tokens) <= found.prompt_length + 5
    assert torch.equal(found.weights_TE[1:], shown.model.route(ids)[0, :-1]) and not found.weights_TE[0].any()
    assert found.shares_E.sum() == pytest.approx(1)


def test_an_owner_who_is_off_has_no_share_and_was_never_there(shown):
    found = continue_text(shown.model, shown.tokenizer, PROMPT, ["press"], 5, None)
    left = shown.model.only(["press"]).eval()
    again = continue_text(left, shown.tokenizer, PROMPT, ["press"], 5, None)
    assert found.tokens == again.tokens and torch.equal(found.weights_TE[:, [0, 2]], again.weights_TE)
    assert not found.weights_TE[:, 1].any()


def test_the_same_seed_draws_the_same_and_leaves_other_draws_alone(shown):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    drawn = [continue_text(shown.model, shown.tokenizer, PROMPT, OWNERS, 8, seed).tokens for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("prompt", "message"), [(" ", "There is nothing to continue"), ("w3 " * 99, "and .* fit")])
def test_what_cannot_be_continued_is_refused(shown, prompt, message):
    with pytest.raises(ValueError, match=message):
        continue_text(shown.model, shown.tokenizer, prompt, OWNERS, 5, None)


def test_tokens_have_the_colour_of_who_wrote_them():
    pytest.importorskip("gradio")
    from hf_fedmoe.demo.owners_page import CONTINUES, coloured, rows_of

    found = Continuation(["a", " b", " c"], 2, torch.tensor([[0, 0], [0.75, 0.25], [0.1, 0.9]]))
    assert coloured(found, ["base", "court"]) == [("a", None), (" b", "base"), (CONTINUES, None), (" c", "court")]
    assert rows_of(found) == [["·c", "0.10", "0.90"]]


@pytest.mark.slow
def test_each_control_in_a_browser(folder, shown):
    need_a_browser()
    full = continue_text(shown.model, shown.tokenizer, PROMPT, OWNERS, 7, None)
    fewer = continue_text(shown.model, shown.tokenizer, PROMPT, ["press"], 7, None)
    drawn = continue_text(shown.model, shown.tokenizer, PROMPT, ["press"], 7, 5)
    with opened(str(folder), 7873) as page:
        page.get_by_role("button", name="Continue").click()
        page.get_by_text("There is nothing to continue: give a prompt.").wait_for()
        page.get_by_label("Prompt").fill(PROMPT)
        page.get_by_role("spinbutton", name="Tokens to write").fill("7")
        page.get_by_role("button", name="Continue").click()
        share = page.get_by_test_id("court-confidence-set")
        share.get_by_text(f"{100 * full.shares_E[1]:.0f}%").wait_for()
        assert f"{full.weights_TE[-1, 1]:.2f}" in page.locator("#table").inner_text()
        page.get_by_role("checkbox", name="court").click()
        page.get_by_role("button", name="Continue").click()
        share.wait_for(state="detached")
        wait_for_text(page, fewer)
        page.get_by_role("radio", name="drawn by the seed").click()
        page.get_by_label("Seed", exact=True).fill("5")
        page.get_by_role("button", name="Continue").click()
        wait_for_text(page, drawn)


def wait_for_text(page, found: Continuation) -> None:
    """Waits until the page shows the continuation, in however many colours."""
    shown = "text => document.querySelector('#text').innerText.replace(/\\s/g, '').includes(text)"
    page.wait_for_function(shown, arg="".join(found.tokens[found.prompt_length :]))
