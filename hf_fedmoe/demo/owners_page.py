"""Lays out the page of a mixture of owners of text."""

from collections.abc import Callable
from typing import Any

import gradio as gr

from ..reporting.markdown import plain
from .continuation import Continuation, continue_text
from .loading import ShownOwners


GREEDY, SAMPLED = "most probable", "drawn by the seed"
# The prompt is set apart from what was written after it.
CONTINUES = " ▸"


def owners_page(shown: ShownOwners) -> gr.Blocks:
    """Makes the page of a mixture of owners of text."""
    base, *owners = shown.model.config.expert_names
    with gr.Blocks(title=f"{shown.name} - hf_fedmoe", analytics_enabled=False) as blocks:
        gr.Markdown(
            f"# {plain(shown.name)}\nA mixture of {len(owners)} owners of text on one base: the more the text so far "
            "looks like an owner's, the more its expert writes. Without an owner who is switched off, the text is "
            "written as if the owner had never been there."
        )
        with gr.Row():
            with gr.Column():
                prompt = gr.Textbox(label="Prompt", lines=4, autofocus=True)
                on = gr.CheckboxGroup(owners, value=owners, label="Owners switched on", elem_id="owners")
                with gr.Row():
                    how = gr.Radio([GREEDY, SAMPLED], value=GREEDY, label="Tokens", elem_id="how")
                    seed = gr.Number(0, label="Seed", precision=0, minimum=0, elem_id="seed")
                length = gr.Slider(1, 100, value=30, step=1, label="Tokens to write", elem_id="length")
                ask = gr.Button("Continue", variant="primary")
            with gr.Column():
                text = gr.HighlightedText(
                    label="Each token in the colour of the expert with most weight",
                    show_legend=True,
                    show_inline_category=False,
                    combine_adjacent=True,
                    elem_id="text",
                )
                shares = gr.Label(label="Mean share in the continuation", show_heading=False, elem_id="shares")
        table = gr.Dataframe(
            headers=["token", base, *owners],
            label="Share of each expert, token by token",
            interactive=False,
            elem_id="table",
        )
        gr.on(
            [ask.click, prompt.submit],
            _continuing(shown, [base, *owners]),
            [prompt, on, how, seed, length],
            [text, shares, table],
            api_visibility="private",
            concurrency_limit=1,  # experts in use are the model's
        )
    return blocks


def _continuing(shown: ShownOwners, names: list[str]) -> Callable[..., tuple[Any, ...]]:
    """Makes the function behind the page's controls."""

    def continued(prompt: str, on: list[str], how: str, seed: int | None, length: int) -> tuple[Any, ...]:
        drawn = int(seed or 0) if how == SAMPLED else None
        try:
            found = continue_text(shown.model, shown.tokenizer, prompt, on, int(length), drawn)
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error
        shares = {name: float(share) for name, share in zip(names, found.shares_E, strict=True) if share > 0}
        return coloured(found, names), shares, rows_of(found)

    return continued


def coloured(found: Continuation, names: list[str]) -> list[tuple[str, str | None]]:
    """Pairs each token with the expert of most weight where it was predicted, none for the first."""
    heads = [names[int(index)] for index in found.weights_TE.argmax(-1)]
    parts: list[tuple[str, str | None]] = [
        (token, name if place else None) for place, (token, name) in enumerate(zip(found.tokens, heads, strict=True))
    ]
    return [*parts[: found.prompt_length], (CONTINUES, None), *parts[found.prompt_length :]]


def rows_of(found: Continuation) -> list[list[str]]:
    """Lists the tokens of the continuation, blanks to be seen, with the share of each expert."""
    written = zip(found.tokens[found.prompt_length :], found.weights_TE[found.prompt_length :].tolist(), strict=True)
    seen = str.maketrans({" ": "·", "\n": "↵"})
    return [[token.translate(seen), *(f"{share:.2f}" for share in shares_E)] for token, shares_E in written]
