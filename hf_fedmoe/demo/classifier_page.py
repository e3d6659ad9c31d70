"""Lays out the page of a mixture of classifiers."""

from collections.abc import Callable
from typing import Any

import gradio as gr

from ..models.configuration_checks import class_names
from ..reporting import names_of_experts
from ..reporting.markdown import plain
from .explanation import Explanation, explain
from .loading import ShownClassifier


SHOWN_CLASSES = 10


def classifier_page(shown: ShownClassifier) -> gr.Blocks:
    """Makes the page of a mixture of classifiers of texts or images."""
    config, experts = shown.model.config, names_of_experts(shown.model)
    by_label = class_names(config)
    classes = [by_label[label] for label in range(len(by_label))]
    with gr.Blocks(title=f"{shown.name} - hf_fedmoe", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        gr.Markdown(
            f"# {plain(shown.name)}\nA mixture of {len(experts)} experts: the gate sends each "
            f"{'image' if shown.reads_images else 'text'} to {config.top_l} of {config.num_routed_experts} routed "
            f"{'experts' if config.num_routed_experts > 1 else 'expert'}. Switch experts off to see what changes."
        )
        with gr.Row():
            with gr.Column():
                content = _image() if shown.reads_images else gr.Textbox(label="Text", lines=4, autofocus=True)
                on = gr.CheckboxGroup(experts, value=experts, label="Experts switched on", elem_id="experts")
                ask = gr.Button("Ask", variant="primary")
            with gr.Column():
                answer = gr.Label(label="Answer", num_top_classes=SHOWN_CLASSES, elem_id="answer")
                change = gr.Markdown(elem_id="change")
                gate = gr.Label(label="Whom the gate chooses among routed experts", show_heading=False, elem_id="gate")
        table = gr.Dataframe(
            headers=["expert", "weight", *classes],
            label="What each expert would have said alone, and its weight in the answer",
            interactive=False,
            pinned_columns=1,
            elem_id="table",
        )
        _facts(shown, experts)
        answering = _answering(shown, experts, classes)
        outputs = [answer, change, gate, table]
        # Adapters share a base, which serves one question at a time.
        options = {"api_visibility": "private", "concurrency_limit": 1, "concurrency_id": "model"}
        ask.click(answering, [content, on], outputs, **options)
        changes = [on.change, content.change if shown.reads_images else content.submit]
        gr.on(changes, _once_there(answering, len(outputs)), [content, on], outputs, **options)
    return blocks


def _image() -> gr.Image:
    # The file itself: Gradio would cut deeper images to 8 bits.
    return gr.Image(label="Image", type="filepath", image_mode=None, sources=["upload", "clipboard"], height=240)


def _answering(shown: ShownClassifier, experts: list[str], classes: list[str]) -> Callable[..., tuple[Any, ...]]:
    """Makes the function behind the page's controls."""

    def answer(content: str | None, on: list[str]) -> tuple[Any, ...]:
        try:
            inputs = shown.inputs(content)
            found = explain(shown.model, inputs, [name in on for name in experts])
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error
        full = found if len(on) == len(experts) else explain(shown.model, inputs, [True] * len(experts))
        return (
            _by_name(classes, found.probabilities_C),
            change_of(full, found, classes, [name for name in experts if name not in on]),
            {
                name: float(p)
                for name, p in zip(experts[-len(found.gate_K) :], found.gate_K, strict=True)
                if name in on
            },
            table_of(found, experts, on),
        )

    return answer


def _once_there(answering: Callable[..., tuple[Any, ...]], num_outputs: int) -> Callable[..., tuple[Any, ...]]:
    """Makes a function that leaves the page as it is while there is nothing to read."""

    def answer(content: str | None, on: list[str]) -> tuple[Any, ...]:
        return answering(content, on) if content else (gr.skip(),) * num_outputs

    return answer


def _by_name(names: list[str], values: Any) -> dict[str, float]:
    return {name: float(value) for name, value in zip(names, values, strict=True)}


def change_of(full: Explanation, found: Explanation, classes: list[str], off: list[str]) -> str:
    """Says in a sentence what changes with experts switched off; nothing where none is."""
    if not off:
        return "All experts are on: this is the model's own answer."
    before, after = int(full.probabilities_C.argmax()), int(found.probabilities_C.argmax())
    was = f"With all experts: **{plain(classes[before])}** at {full.probabilities_C[before]:.3f}."
    now = f"Without {', '.join(off)}: **{plain(classes[after])}** at {found.probabilities_C[after]:.3f}."
    largest = float((full.probabilities_C - found.probabilities_C).abs().max())
    return f"{was} {now} The probability that moves most moves by {largest:.3f}."


def table_of(found: Explanation, experts: list[str], on: list[str]) -> list[list[str]]:
    """Lists each expert, its weight in the answer and its own probability of each class."""
    return [
        [name, f"{weight:.3f}" if name in on else "off", *(f"{p:.3f}" for p in own_C)]
        for name, weight, own_C in zip(experts, found.weights_S.tolist(), found.experts_SC.tolist(), strict=True)
    ]


def _facts(shown: ShownClassifier, experts: list[str]) -> None:
    """Two tables of what was saved beside the model, those that there are."""
    if shown.facts is None:
        return
    if shown.facts.clients:
        gr.Dataframe(
            _rows(experts, shown.facts.contribution_SM),
            headers=["expert", *shown.facts.clients],
            label="Who contributed to each expert: share of each client",
            interactive=False,
            pinned_columns=1,
            elem_id="contributions",
        )
    if shown.facts.classes:
        gr.Dataframe(
            _rows(experts[-len(shown.facts.gate_share_KC) :], shown.facts.gate_share_KC),
            headers=["expert", *shown.facts.classes],
            label="Whom the gate chose in the test: mean gate probability by true class",
            interactive=False,
            pinned_columns=1,
            elem_id="gate_by_class",
        )


def _rows(names: list[str], values: list[list[float]]) -> list[list[str]]:
    return [[name, *(f"{value:.2f}" for value in row)] for name, row in zip(names, values, strict=True)]
