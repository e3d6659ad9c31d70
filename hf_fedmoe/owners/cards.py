"""Cards of an expert and of a mixture of owners: whose it is, from which text, and what can be undone."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..models import FedMoECausalConfig
from ..reporting.markdown import code, plain, table


TAGS = ["federated-learning", "fedmoe"]


def expert_card(facts: dict[str, Any]) -> ModelCard:
    """
    Makes the card of an owner's expert; a mixture reads the owner's name, licence and tokens from its head.

    Args:
        facts (`dict`): The fields of [`ExpertFacts`].
    """
    head = _head([facts["licence"]], library_name="peft", base_model=facts["base"], owner=_known(facts))
    noise = (
        f", with noise of differential privacy for each sequence (epsilon {facts['epsilon']}, delta {facts['delta']})"
        if facts["epsilon"] is not None
        else ""
    )
    rows = [(name.replace("_", " "), value) for name, value in _known(facts).items()]
    return ModelCard(
        f"---\n{head.to_yaml()}\n---\n\n# An expert of {plain(facts['name'])}\n\n"
        f"A LoRA adapter of {code(facts['base'])}, trained by its owner alone, and `statistics.safetensors`: the sums "
        "that the router of a mixture is made of. No text is here, but an adapter can have learnt passages by heart, "
        f"and the sums say which tokens the texts begin with and go together with{noise}.\n\n"
        f"{table(rows, ['fact', 'value'])}\n\n"
        "Put it into a mixture with `hf-fedmoe expert merge BASE FOLDER ... --out MIXTURE`. The base must have the "
        "hash above.\n"
    )


def owner_in_card(path: Path) -> dict[str, Any]:
    """
    Reads what an expert's card says of its owner.

    Args:
        path (`Path`): The `README.md`; without one, or without an owner in it, nothing is known.

    Returns:
        `dict`: Of `name`, `licence` and `tokens` those that are there.

    Raises:
        `ValueError`: If what is there is no such fact.
    """
    if not path.is_file():
        return {}
    owner = ModelCard.load(path, ignore_metadata_errors=True).data.to_dict().get("owner") or {}
    if not isinstance(owner, dict):
        raise ValueError(
            f"`owner` is {owner!r} in {str(path)!r}: write a mapping with `name`, `licence` and `tokens`."
        )
    found = {}
    for name, kind in (("name", str), ("licence", str), ("tokens", int)):
        if name in owner:
            if not isinstance(owner[name], kind) or isinstance(owner[name], bool):
                raise ValueError(f"`owner.{name}` is {owner[name]!r} in {str(path)!r}: write a {kind.__name__}.")
            if kind is int and owner[name] < 1:
                raise ValueError(f"`owner.{name}` is {owner[name]} in {str(path)!r}: write how many there were.")
            found[name] = owner[name]
    return found


def mixture_card(config: FedMoECausalConfig, training: str = "") -> ModelCard:
    """
    Makes the card of a mixture of owners.

    Args:
        config ([`FedMoECausalConfig`]): Of the mixture.
        training (`str`, *optional*): How its experts were trained, in Markdown, where that is known of all.
    """
    owners, router_names = config.owners or [], config.router_names or []
    licences = [owner.get("licence") for owner in owners]
    head = _head(licences, library_name="transformers", base_model=config.base_model_name_or_path)
    rows = []
    for owner in owners:
        in_router = "yes" if owner["name"] in router_names else "no, has no weight"
        rows.append((owner["name"], owner.get("licence", "not told"), owner.get("tokens", "not told"), in_router))
    trained = f"\n## Training\n\n{training}\n" if training else ""
    public = (
        "The router knows public text, which goes to the base."
        if "base" in router_names
        else "The router knows no public text: the base has no weight, and text of nobody goes to some owner."
    )
    return ModelCard(
        f"---\n{head.to_yaml()}\n---\n\n# A mixture of {len(owners)} owners of text\n\n"
        f"LoRA experts of {code(config.base_model_name_or_path)} (`base_sha256` {code(config.base_sha256)}), one of "
        f"each owner, who pooled nothing, and a router in closed form from their sums. {public}\n\n"
        f"{table(rows, ['owner', 'licence', 'tokens', 'known to the router'])}\n\n"
        "```python\nimport hf_fedmoe\nfrom transformers import AutoModelForCausalLM\n\n\n"
        'model = AutoModelForCausalLM.from_pretrained("this folder")\n```\n\n'
        "`model.route(input_ids)` is each owner's weight at each token; its mean over an answer is the owner's share "
        "in it.\n\n## An owner who opts out\n\n"
        "`hf-fedmoe expert remove MIXTURE OWNER --out FOLDER` writes a mixture that is, bit for bit, one that never "
        "had the owner. It does not undo copies of this one, nor what others have learnt from texts that this one "
        f"wrote.\n{trained}"
    )


def _known(facts: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in facts.items() if value is not None}


def _head(licences: list[str | None], **entries: Any) -> ModelCardData:
    told = sorted({licence for licence in licences if licence})
    # The Hub knows a list of licences by its own names; any other one is `other` with a name.
    licence: dict[str, Any] = {"license": "other", "license_name": ", ".join(told)} if told else {}
    return ModelCardData(pipeline_tag="text-generation", tags=TAGS, **licence, **_known(entries))
