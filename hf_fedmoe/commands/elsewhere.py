"""`hf-fedmoe server` and `hf-fedmoe client`: a federation whose clients are on other machines."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .one_line import in_one_line, refuse
from .sigterm import ending_with_sigterm


def add(commands: "argparse._SubParsersAction[Any]") -> None:
    """Adds the commands."""
    server = commands.add_parser(
        "server",
        allow_abbrev=False,
        help="the server of clients elsewhere, from one YAML",
        description="Starts Flower's SuperLink, waits for clients and trains with them. The same command goes on from "
        "the last checkpoint.",
    )
    server.add_argument("file", help="the federation's YAML (docs/deployment.md)")
    server.add_argument("--host", default="127.0.0.1", help="address to listen on, 0.0.0.0 for all (127.0.0.1)")
    server.add_argument("--port", type=int, default=8000, help="port to listen on (8000)")
    server.add_argument("--ssl-certfile", help="the server's TLS certificate; without one nothing is encrypted")
    server.add_argument("--ssl-keyfile", help="its private key")
    server.add_argument("--ssl-ca-certfile", help="the certificate of who signed it")
    server.add_argument("--node-keys", nargs="+", metavar="FILE", help="public keys of the nodes that may come (any)")
    server.set_defaults(run=_serve, parser=server)
    client = commands.add_parser(
        "client",
        allow_abbrev=False,
        help="a client of a server elsewhere, with its own rows",
        description="Starts Flower's SuperNode, which trains on this machine's rows whenever the server asks.",
    )
    client.add_argument("--superlink", required=True, help="host:port of the server")
    client.add_argument(
        "--data", required=True, help="a .csv or .parquet file, a folder of images, or mydata.py:function"
    )
    client.add_argument("--folder", required=True, help="of this client alone: what stays with it")
    client.add_argument("--client", type=int, help="its number (the first that is free)")
    client.add_argument("--root-certificates", help="of the server's TLS; without them nothing is encrypted")
    client.add_argument("--private-key", help="this node's, if the server asks for keys")
    client.set_defaults(run=_take_part, parser=client)


def _serve(parser: argparse.ArgumentParser, options: argparse.Namespace, words: list[str]) -> None:
    refuse(parser, words)
    files = {name: vars(options)[f"ssl_{name}"] for name in ("certfile", "keyfile", "ca_certfile")}
    if any(files.values()) and not all(files.values()):
        parser.error("--ssl-certfile, --ssl-keyfile and --ssl-ca-certfile go together")
    with in_one_line(parser), _failures_told(), ending_with_sigterm():
        from ..deployment.federation_file import read_federation
        from ..deployment.launching import check_flower, run_server

        check_flower()
        output_dir = read_federation(options.file)[1]["output_dir"]
        certificates = files if all(files.values()) else None
        run_server(options.file, output_dir, options.host, options.port, certificates, options.node_keys or ())
        print(f"{output_dir}: the model and its card")


def _take_part(parser: argparse.ArgumentParser, options: argparse.Namespace, words: list[str]) -> None:
    refuse(parser, words)
    with in_one_line(parser), _failures_told(), ending_with_sigterm():
        from ..deployment.launching import check_flower, run_client

        check_flower()
        certificates, key = options.root_certificates, options.private_key
        run_client(options.superlink, options.data, options.folder, options.client, certificates, key)


@contextmanager
def _failures_told() -> Iterator[None]:
    """Has what Flower's processes say go into one line too."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(str(error)) from error
