"""
Certificates and keys for a trial on this machine, by `openssl` and `ssh-keygen`. A federation in earnest has a
certificate for the server's own name, from whoever signs certificates there, and a key that each node makes itself.
"""

import subprocess
from pathlib import Path


def make_certificates(folder: Path, address: str) -> dict[str, Path]:
    """Writes an authority of certificates and one that it has signed, of an address; returns the server's files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: folder / f"{name}.pem" for name in ("ca_certfile", "certfile", "keyfile")}
    authority, request = folder / "ca_key.pem", folder / "request.pem"
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:secp384r1", "-nodes"]
    _run("openssl", "req", "-x509", *key, "-keyout", authority, "-out", files["ca_certfile"], "-subj", "/CN=trial")
    _run("openssl", "req", *key, "-keyout", files["keyfile"], "-out", request, "-subj", f"/CN={address}")
    names = folder / "names.txt"
    names.write_text(f"subjectAltName = IP:{address}\n")
    signer = ["-CA", files["ca_certfile"], "-CAkey", authority, "-CAcreateserial", "-extfile", names]
    _run("openssl", "x509", "-req", "-in", request, *signer, "-out", files["certfile"], "-days", "30")
    return files


def make_key(file: Path) -> Path:
    """Writes a node's private key, and beside it the public one, which the server is given; returns the latter."""
    public = Path(f"{file}.pub")
    if not public.is_file():
        _run("ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", file)
    return public


def _run(*words: str | Path) -> None:
    subprocess.run([str(word) for word in words], check=True, capture_output=True)
