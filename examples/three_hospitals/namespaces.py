"""
Two machines on this one: network namespaces of Linux, joined by nothing but a cable (a veth pair). Programs in one
find those in the other by their addresses only, and nothing else at all. Needs `ip` and root.
"""

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager


# Names of namespaces, and the addresses that their ends of the cable have.
SERVER, CLIENTS = "hf_fedmoe_server", "hf_fedmoe_clients"
ADDRESSES = {SERVER: "10.213.0.1", CLIENTS: "10.213.0.2"}


@contextmanager
def two_machines() -> Iterator[None]:
    """Has both namespaces while a block runs."""
    with ExitStack() as stack:
        for name in ADDRESSES:
            _ip("netns", "add", name)
            stack.callback(_ip, "netns", "delete", name)
        _ip("link", "add", "cable", "netns", SERVER, "type", "veth", "peer", "name", "cable", "netns", CLIENTS)
        for name, address in ADDRESSES.items():
            _ip("-n", name, "address", "add", f"{address}/30", "dev", "cable")
            for device in ("lo", "cable"):
                _ip("-n", name, "link", "set", device, "up")
        yield


def inside(name: str) -> list[str]:
    """Returns what goes before a command that runs in a namespace."""
    return ["ip", "netns", "exec", name]


def _ip(*words: str) -> None:
    found = subprocess.run(["ip", *words], capture_output=True, text=True)
    if found.returncode:
        raise SystemExit(f"ip {' '.join(words)}: {found.stderr.strip()}; namespaces need Linux and root.")
