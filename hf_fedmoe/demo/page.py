"""The page as it is opened: of a model by its name, and served to this machine alone."""

import os
import socket
from typing import Any

from .loading import ShownClassifier, load_shown


# A page of this policy asks no other machine for anything, whatever Gradio or a model's names of classes say.
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"
LOCAL = "127.0.0.1"


def page(model: str) -> Any:
    """
    Makes the page of a model, `gradio.Blocks`, of which `launch()` is for a Space and [`serve`] for this machine.

    Args:
        model (`str`): Folder of the model or of its run, or a Hub id.

    Raises:
        ImportError: When Gradio is missing.
        ValueError: When the model cannot be shown.
    """
    need_gradio()
    shown = load_shown(model)
    if isinstance(shown, ShownClassifier):
        from .classifier_page import classifier_page

        return classifier_page(shown)
    from .owners_page import owners_page

    return owners_page(shown)


def serve(blocks: Any, port: int, wait: bool = True) -> str:
    """
    Serves a page on 127.0.0.1, until it is interrupted.

    Args:
        blocks (`Any`): From [`page`].
        port (`int`): The port.
        wait (`bool`, *optional*, defaults to `True`): `False` returns while a thread serves; `blocks.close()` ends it.

    Returns:
        `str`: Its address.

    Raises:
        ValueError: When the port cannot be used.
    """
    check_port(port)
    from starlette.middleware import Middleware

    _, address, _ = blocks.launch(
        server_name=LOCAL,
        server_port=port,
        share=False,
        ssr_mode=False,
        quiet=True,
        prevent_thread_lock=True,
        footer_links=[],
        app_kwargs={"middleware": [Middleware(_WithPolicy)]},
    )
    if wait:
        print(f"{address} shows the model, to this machine only; Ctrl+C ends it.", flush=True)
        blocks.block_thread()
    return address


def check_port(port: int) -> None:
    """Raises a `ValueError` unless a page can be served at the port of this machine."""
    if not 0 < port < 65536:
        raise ValueError(f"`port` is {port}: give 1 to 65535.")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that was just closed will do
        try:
            probe.bind((LOCAL, port))
        except OSError as error:
            raise ValueError(f"The port {port} cannot be used ({error.strerror}): give another, `--port`.") from error


def need_gradio() -> None:
    """Imports Gradio with its reports to others off; raises an `ImportError` that names the extra if it is missing."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise ImportError("The page needs Gradio: `pip install 'hf_fedmoe[demo]'`.") from error


class _WithPolicy:
    """Adds the policy to what an ASGI application answers."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        await self.app(scope, receive, send_with_policy)
