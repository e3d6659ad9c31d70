"""The most memory that this process has had."""

import resource
import sys
from contextlib import suppress
from pathlib import Path


def forget_peak() -> None:
    """Has the peak begin anew with what there is now, where the operating system can: on Linux."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """Returns the most memory since [`forget_peak`], or since the process began where there is no telling."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    # In kilobytes, on macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
