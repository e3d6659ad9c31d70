"""`hf-fedmoe demo`: a page that shows a mixture at work, here or as a Space."""

import argparse
import sys
from importlib.util import find_spec
from typing import Any

from .one_line import announce_loading, in_one_line, quietly, refuse


# As the page says it.
NO_GRADIO = "The page needs Gradio: `pip install 'hf_fedmoe[demo]'`."


def add(commands: "argparse._SubParsersAction[Any]") -> None:
    """Adds the command."""
    demo = commands.add_parser(
        "demo",
        allow_abbrev=False,
        help="a page that shows a mixture at work, expert by expert",
        description="Opens a page on this machine, and for it only: give a text or an image, see the answer, whom the "
        "gate chose and what each expert would have said, and switch experts or owners off. Needs the extra "
        "hf_fedmoe[demo].",
    )
    demo.add_argument("model", help="folder of a mixture or of its run, or a Hub id")
    demo.add_argument("--port", type=int, default=7860, help="of the page (7860)")
    demo.add_argument("--space", metavar="FOLDER", help="write the page's files for a Space there, and open none")
    demo.set_defaults(run=run, parser=demo)


def run(parser: argparse.ArgumentParser, options: argparse.Namespace, words: list[str]) -> None:
    """Runs the command."""
    refuse(parser, words)
    if options.space is None and "gradio" not in sys.modules and find_spec("gradio") is None:
        parser.exit(2, f"{parser.prog}: {NO_GRADIO}\n")  # before PyTorch is loaded, which takes seconds
    announce_loading()
    with in_one_line(parser):
        from ..demo import page, serve, write_space
        from ..demo.page import check_port, need_gradio

        if options.space is not None:
            paths = write_space(options.model, options.space)
            print(f"Written: {', '.join(map(str, paths))}. `hf-fedmoe push {options.space} NAME/SPACE --space`")
            return
        need_gradio()  # before a model is loaded
        check_port(options.port)
        with quietly():
            blocks = page(options.model)
        serve(blocks, options.port)
