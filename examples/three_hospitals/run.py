"""
A SuperLink and three SuperNodes on this machine, each with the reviews of one department: `python
examples/three_hospitals/run.py`. What is three hospitals on three machines is three processes with three files here.
With `--tls` all that they send is encrypted, and only these three may come, by their keys. With `--namespaces` the
server is in one network namespace and the hospitals are in another: two machines with a cable (Linux, as root).
"""

import argparse
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

from keys import make_certificates, make_key
from namespaces import ADDRESSES, CLIENTS, SERVER, inside, two_machines
from transformers import pipeline

from hf_fedmoe.data import load_source


HERE = Path(__file__).parent
HOSPITALS = ("Tops", "Dresses", "Bottoms")  # departments of the shipped reviews, whose rows nobody pools
COMMAND = [sys.executable, "-m", "hf_fedmoe.cli"]
SENTENCES = ("I love it, a perfect fit and beautiful fabric.", "Terrible quality. It fell apart after one wash.")


def write_files(folder: Path, rows: int) -> None:
    """Writes the file of each hospital, and those of the server."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(HERE / "federation.yaml", folder)
    reviews = load_source("reviews")["train"].shuffle(seed=0)
    names = reviews.features["label"].names
    reviews = reviews.map(lambda row: {"stars": names[row["label"]]}).remove_columns("label")
    reviews = reviews.rename_column("stars", "label")
    for hospital in HOSPITALS:
        own = reviews.filter(lambda row, hospital=hospital: row["department"] == hospital)
        own.select(range(rows)).select_columns(["text", "label"]).to_csv(folder / f"{hospital}.csv")
    # Of departments that no hospital has.
    rest = reviews.filter(lambda row: row["department"] not in HOSPITALS).select_columns(["text", "label"])
    rest.select(range(rows)).to_csv(folder / "reserved.csv")
    rest.select(range(rows, rows + 60)).to_csv(folder / "validation.csv")


@contextmanager
def client(folder: Path, superlink: str, place: int, before: list[str], security: list[str]) -> Iterator[None]:
    """Runs a hospital's command while a block runs."""
    name = HOSPITALS[place]
    command = [*before, *COMMAND, "client", "--superlink", superlink, "--data", f"{name}.csv", "--folder", name]
    with (folder / f"{name}.log").open("w") as log:
        process = subprocess.Popen([*command, "--client", str(place), *security], cwd=folder, stdout=log, stderr=log)
        try:
            yield
        finally:
            process.terminate()
            process.wait()


def secured(folder: Path, host: str) -> tuple[list[str], list[list[str]]]:
    """Writes certificates and keys; returns what the server's and each client's command say of them."""
    files = make_certificates(folder / "tls", host)
    keys = [folder / "tls" / f"{name}_key" for name in HOSPITALS]
    server = [word for name, file in files.items() for word in (f"--ssl-{name.replace('_', '-')}", str(file))]
    server += ["--node-keys", *(str(make_key(key)) for key in keys)]
    trusted = ["--root-certificates", str(files["ca_certfile"])]
    return server, [[*trusted, "--private-key", str(key)] for key in keys]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/three_hospitals"))
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--rows", type=int, default=120, help="of each hospital, and of the server")
    parser.add_argument("--tls", action="store_true", help="encrypted, with a key of each hospital")
    parser.add_argument("--namespaces", action="store_true", help="server and hospitals in two network namespaces")
    options = parser.parse_args()
    folder = options.folder.resolve()
    write_files(folder, options.rows)
    host, at_server, at_clients, machines = "127.0.0.1", [], [], nullcontext()
    if options.namespaces:
        host, at_server, at_clients, machines = ADDRESSES[SERVER], inside(SERVER), inside(CLIENTS), two_machines()
    of_server, of_clients = secured(folder, host) if options.tls else ([], [[] for _ in HOSPITALS])
    with ExitStack() as stack:
        stack.enter_context(machines)
        for place in range(len(HOSPITALS)):
            stack.enter_context(client(folder, f"{host}:{options.port}", place, at_clients, of_clients[place]))
        server = ["server", "federation.yaml", "--host", host, "--port", str(options.port), *of_server]
        subprocess.run([*at_server, *COMMAND, *server], cwd=folder, check=True)
    classify = pipeline("text-classification", model=str(folder / "run"))
    for sentence in SENTENCES:
        print(f"{classify(sentence)[0]['label']:>8s}  {sentence}")


if __name__ == "__main__":
    main()
