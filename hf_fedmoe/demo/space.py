"""A page as a Space of the Hugging Face Hub: three files that name the model by its Hub id."""

from pathlib import Path

from huggingface_hub import SpaceCard, SpaceCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..reporting.markdown import plain


# The version that the page is tested with.
GRADIO = "6.31.0"
PYTHON = "3.12"
REQUIREMENTS = "hf_fedmoe[demo]\n"
APP = '''"""Shows a mixture of experts at work."""

from hf_fedmoe.demo import page


page("{model}").launch()
'''


def write_space(model: str, folder: str) -> list[Path]:
    """
    Writes the files of a Space that shows a model.

    Args:
        model (`str`): The model's Hub id, `NAME/MODEL`: a Space cannot see a folder of this machine.
        folder (`str`): Where they go; made if needed.

    Returns:
        `list[Path]`: The files.

    Raises:
        ValueError: When `model` is no Hub id, or a file is there already.
    """
    try:
        validate_repo_id(model)
        named = model.count("/") == 1 and not Path(model).exists()
    except HFValidationError:
        named = False
    if not named:
        raise ValueError(
            f"`model` is {model!r}: a Space needs the model's Hub id. Send it there first, `hf-fedmoe push FOLDER "
            "NAME/MODEL`, and give NAME/MODEL."
        )
    title = model.partition("/")[2]
    data = SpaceCardData(
        title=title,
        sdk="gradio",
        sdk_version=GRADIO,
        python_version=PYTHON,
        app_file="app.py",
        models=[model],
        tags=["federated-learning", "mixture-of-experts"],
    )
    text = f"# {plain(title)}\n\nShows the experts of [{plain(model)}](https://huggingface.co/{model}) at work.\n"
    contents = {
        "app.py": APP.format(model=model),
        "requirements.txt": REQUIREMENTS,
        "README.md": str(SpaceCard(f"---\n{data}\n---\n\n{text}")),
    }
    paths = {Path(folder, name): content for name, content in contents.items()}
    for path in paths:
        if path.exists():
            raise ValueError(f"{str(path)!r} is there already, and would be lost: give another folder.")
    Path(folder).mkdir(parents=True, exist_ok=True)
    for path, content in paths.items():
        path.write_text(content, encoding="utf-8")
    return list(paths)
