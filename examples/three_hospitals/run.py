"""
A SuperLink and three SuperNodes on this machine, each with the reviews of one department: `python
examples/three_hospitals/run.py`. What is three hospitals on three machines is three processes with three files here.
With `--tls` all that they send is encrypted, and only these three may come, by their keys.
"""

import argparse
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from keys import make_certificates, make_key
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
def client(folder: Path, port: int, place: int, security: list[str]) -> Iterator[None]:
    """Runs a hospital's command while a block runs."""
    name = HOSPITALS[place]
    command = [*COMMAND, "client", "--superlink", f"127.0.0.1:{port}", "--data", f"{name}.csv", "--folder", name]
    with (folder / f"{name}.log").open("w") as log:
        process = subprocess.Popen([*command, "--client", str(place), *security], cwd=folder, stdout=log, stderr=log)
        try:
            yield
        finally:
            process.terminate()
            process.wait()


def secured(folder: Path) -> tuple[list[str], list[list[str]]]:
    """Writes certificates and keys; returns what the server's and each client's command say of them."""
    files = make_certificates(folder / "tls")
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
    options = parser.parse_args()
    folder = options.folder.resolve()
    write_files(folder, options.rows)
    of_server, of_clients = secured(folder) if options.tls else ([], [[] for _ in HOSPITALS])
    with ExitStack() as hospitals:
        for place in range(len(HOSPITALS)):
            hospitals.enter_context(client(folder, options.port, place, of_clients[place]))
        server = [*COMMAND, "server", "federation.yaml", "--port", str(options.port), *of_server]
        subprocess.run(server, cwd=folder, check=True)
    classify = pipeline("text-classification", model=str(folder / "run"))
    for sentence in SENTENCES:
        print(f"{classify(sentence)[0]['label']:>8s}  {sentence}")


if __name__ == "__main__":
    main()
