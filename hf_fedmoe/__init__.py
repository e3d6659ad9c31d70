"""Federated learning with a server-side Mixture-of-Experts, in Hugging Face terms."""

import sys
from pathlib import PurePath


__version__ = "0.1.0"

# `import hf_fedmoe` registers the Auto classes. Only the command `hf-fedmoe` leaves that to what it calls: with them
# comes torch, and a mistyped word would be answered after seconds.
if PurePath(*sys.argv[:1]).name != "hf-fedmoe":
    from . import models  # noqa: F401
