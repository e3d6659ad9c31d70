"""Class counts of clients, as numbers, as text and as a plot."""

import itertools
import os
import re
from collections.abc import Mapping, Sequence

import numpy as np

from .counted import counted


MAX_LEGEND_CLASSES = 20
MAX_TABLE_CLASSES = 12
MAX_SHARE_CLASSES = 6
MAX_TABLE_CLIENTS = 30


def count_labels(labels: np.ndarray, parts: Sequence[np.ndarray], num_labels: int) -> np.ndarray:
    """
    Counts the classes of each part.

    Args:
        labels (`np.ndarray`, shape `[N]`): Labels of the pool.
        parts (`Sequence[np.ndarray]`): M arrays of rows of the pool.
        num_labels (`int`): Number of classes C.

    Returns:
        `np.ndarray`: Shape `[M, C]`, int64.
    """
    return np.stack([np.bincount(labels[rows], minlength=num_labels) for rows in parts])


def label_table(names: Sequence[str], counts_MC: np.ndarray, label_names: Sequence[str]) -> str:
    """
    A table of rows "name, size, count and share of each class".

    Shares are left out above six classes; above twelve the columns are "classes present" and "largest class" instead.

    Args:
        names (`Sequence[str]`): M names of clients or splits.
        counts_MC (`np.ndarray`, shape `[M, C]`): Class counts.
        label_names (`Sequence[str]`): C names of classes.

    Returns:
        `str`: Aligned text, one line for the header and one for each name.
    """
    many = len(label_names) > MAX_TABLE_CLASSES
    header = ["", "size", *(["classes", "largest class"] if many else label_names)]
    lines = [header]
    for name, counts_C in zip(names, counts_MC, strict=True):
        size = int(counts_C.sum())
        if many:
            top = int(counts_C.argmax())
            cells = [
                f"{np.count_nonzero(counts_C)}/{len(counts_C)}",
                f"{label_names[top]} ({counts_C[top] / max(size, 1):.0%})",
            ]
        elif len(label_names) > MAX_SHARE_CLASSES:
            cells = [str(count) for count in counts_C]
        else:
            cells = [f"{count} ({count / max(size, 1):.0%})" for count in counts_C]
        lines.append([name, str(size), *cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    )


def clients_table(
    shown: Sequence[str], counts_MC: np.ndarray, splits: Mapping[str, np.ndarray], label_names: Sequence[str]
) -> str:
    """
    The table of [`label_table`] for the first clients, all clients and the server's splits.

    Args:
        shown (`Sequence[str]`): Names of the clients that have a row.
        counts_MC (`np.ndarray`, shape `[M, C]`): Class counts of all clients.
        splits (`Mapping[str, np.ndarray]`): Labels of each split.
        label_names (`Sequence[str]`): C names of classes.

    Returns:
        `str`: Aligned text.
    """
    counts = [*counts_MC[: len(shown)], counts_MC.sum(axis=0)]
    counts += [np.bincount(labels, minlength=len(label_names)) for labels in splits.values()]
    table = label_table([*shown, "all clients", *splits], np.stack(counts), label_names).splitlines()
    if len(shown) < len(counts_MC):
        table.insert(1 + len(shown), f"... and {counted(len(counts_MC) - len(shown), 'more client')}")
    return "\n".join(table)


def are_in_order(names: Sequence[str]) -> bool:
    """
    Tells whether classes are steps of a scale, as stars are: names that differ in a rising number only, for three to
    ten classes. Digits from 0 are kinds, not steps.
    """
    numbers = [re.findall(r"\d+", name) for name in names]
    if not 3 <= len(names) <= 10 or any(len(found) != 1 for found in numbers):
        return False
    values = [int(found[0]) for found in numbers]
    rest = {re.sub(r"\d+", "", name).strip().rstrip("s") for name in names}
    return len(rest) == 1 and values[0] > 0 and all(one < other for one, other in itertools.pairwise(values))


def plot_labels(
    counts_MC: np.ndarray,
    label_names: Sequence[str],
    path: str | os.PathLike,
    client_names: Sequence[str] | None = None,
) -> None:
    """
    Draws one bar for each client, stacked by class, and writes it as an image (format by the suffix of `path`).

    Args:
        counts_MC (`np.ndarray`, shape `[M, C]`): Class counts.
        label_names (`Sequence[str]`): C names of classes; a legend is drawn for up to twenty.
        path (`str` or `os.PathLike`): Where to write.
        client_names (`Sequence[str]`, *optional*): At least M names of clients, which stand below the bars of up to
            thirty; their numbers if left out.
    """
    # Imported here because it is slow; a Figure by itself leaves the user's backend and open figures alone.
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import AutoLocator

    num_clients, num_classes = counts_MC.shape
    figure = Figure(figsize=(min(4.0 + 0.3 * num_clients, 16.0), 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    # "tab" palettes hold 10 and 20 colours that are told apart easily; beyond that a continuous one must do, and where
    # classes have an order it shows.
    if are_in_order(label_names):
        colors = colormaps["viridis"](np.linspace(0, 0.95, num_classes))
    elif num_classes <= MAX_LEGEND_CLASSES:
        colors = colormaps["tab10" if num_classes <= 10 else "tab20"](np.arange(num_classes))
    else:
        colors = colormaps["nipy_spectral"](np.linspace(0.02, 0.98, num_classes))
    bottom_M = np.zeros(num_clients)
    for label, (name, counts_M) in enumerate(zip(label_names, counts_MC.T, strict=True)):
        axes.bar(np.arange(num_clients), counts_M, bottom=bottom_M, width=0.9, color=colors[label], label=name)
        bottom_M += counts_M
    axes.set(xlabel="client", ylabel="examples", xlim=(-0.6, num_clients - 0.4))
    if client_names is None or num_clients > MAX_TABLE_CLIENTS:
        locator = AutoLocator()
        locator.set_params(integer=True)
        axes.xaxis.set_major_locator(locator)
    else:
        axes.set_xticks(np.arange(num_clients), client_names[:num_clients], rotation=45, ha="right")
        for text in axes.get_xticklabels():
            text.set_parse_math(False)
    if num_classes <= MAX_LEGEND_CLASSES:
        figure.legend(loc="outside right upper", frameon=False, title="class")
    figure.savefig(path)
