"""Writes the tables of docs/hyperparameters.md from the recipes: `python docs/site/hyperparameter_tables.py`."""

from pathlib import Path
from typing import Any

import yaml
from paper_index import anchor


REPOSITORY = Path(__file__).parents[2]
BEGIN, END = "<!-- hyperparameters:begin -->", "<!-- hyperparameters:end -->"
# Task, recipe, preset (and `with_lora` in it), and the heading of docs/results.md with the figures.
RECIPES = [
    ("reviews, a small GPT-2", "yelp_gpt2", "quick", "Reviews (shipped), a small GPT-2"),
    ("tweets, MiniLM", "sent140_bert", "quick", "SENT-140 stand-in"),
    ("tweets, LoRA on MiniLM", "sent140_bert", "quick with_lora", "Experts as LoRA adapters"),
    ("characters, a CNN from random weights", "femnist_cnn", "unipen", "Characters by writer, the CNN of FEMNIST"),
    ("photographs, a narrow ResNet from random weights", "cifar10_resnet18", "narrow", "CIFAR-10, a narrow ResNet-18"),
]
PERSONAL = {"photographs": "pfedmm_cifar10", "characters": "pfedmm_emnist"}
SETTINGS = ["rounds", "num_train_epochs", "per_device_train_batch_size", "learning_rate", "expert_learning_rate"]


def number(value: Any) -> str:
    """Writes a setting as one types it."""
    return f"{value:.0e}".replace("e-0", "e-") if isinstance(value, float) and value < 0.01 else f"{value:g}"


def recipe_row(task: str, recipe: str, preset: str, heading: str) -> str:
    """Returns the row of a task: its settings, the recipe that has them, and the figures that came of them."""
    name, *inner = preset.split()
    settings = yaml.safe_load((REPOSITORY / "recipes" / f"{recipe}.yaml").read_text())[name]
    settings |= settings[inner[0]] if inner else {}
    cells = [number(settings[each]) for each in SETTINGS]
    source = f"[{recipe}](../recipes/{recipe}.yaml), `{preset}`"
    return " | ".join([f"| {task}", *cells, source, f"[figures](results.md#{anchor(heading)}) |"])


def personal_settings(name: str) -> dict[str, dict[str, Any]]:
    """Returns what a comparison's small size gives each of its methods, beyond the method's defaults."""
    comparison = yaml.safe_load((REPOSITORY / "recipes" / "paper" / f"{name}.yaml").read_text())
    own = comparison["sizes"]["small"]["methods"]
    rows = {row: {} if isinstance(given, str) else dict(given) for row, given in comparison["methods"].items()}
    start = {"learning_rate": comparison["settings"]["learning_rate"]}
    return {row: start | given | own.get(row, {}) for row, given in rows.items()}


def personal_cell(settings: dict[str, Any]) -> str:
    """Returns a method's learning rate, and its own coefficients in brackets."""
    others = [f"`{name}` {number(value)}" for name, value in settings.items() if isinstance(value, int | float)]
    rate, *others = [each.removeprefix("`learning_rate` ") for each in others]
    return f"{rate} ({', '.join(others)})" if others else rate


def tables() -> str:
    """Returns both tables as Markdown."""
    head = ["task", "rounds", "local epochs", "batch", "learning rate", "on the reserved set", "source", "accuracy"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head), *(recipe_row(*row) for row in RECIPES)]
    by_task = {task: personal_settings(name) for task, name in PERSONAL.items()}
    sources = [f"{task}, [{name}](../recipes/paper/{name}.yaml)" for task, name in PERSONAL.items()]
    lines += [
        "",
        "### Personalised methods, by SGD",
        "",
        "| method | " + " | ".join(sources) + " |",
        "| --- | --- | --- |",
    ]
    for method in by_task["photographs"]:
        lines.append(f"| {method} | " + " | ".join(personal_cell(each[method]) for each in by_task.values()) + " |")
    return "\n".join(lines)


def page(text: str) -> str:
    """Returns the page with its tables written anew."""
    start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    return f"{text[:start]}\n\n{tables()}\n\n{text[end:]}"


if __name__ == "__main__":
    path = REPOSITORY / "docs/hyperparameters.md"
    path.write_text(page(path.read_text()))
