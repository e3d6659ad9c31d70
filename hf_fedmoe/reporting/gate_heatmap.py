"""Draws which expert takes which class (Fed-MoE, Figure 3)."""

import os

import numpy as np


def plot_gate(share_KC: np.ndarray, label_names: list[str], path: str | os.PathLike) -> None:
    """
    Saves a heat map of gate probabilities, experts by classes.

    Args:
        share_KC (`np.ndarray` of shape `[K, C]`): Mean gate probability of expert k on examples of class c; classes of
            NaN, without examples, are left out.
        label_names (`list[str]`): The C classes.
        path (`str`): Where the picture goes; its ending chooses the format.
    """
    from matplotlib.figure import Figure  # drawing without pyplot needs no display and no backend

    found = np.flatnonzero(~np.isnan(share_KC).any(axis=0))
    share_KC, label_names = share_KC[:, found], [label_names[label] for label in found]
    num_experts, num_classes = share_KC.shape
    figure = Figure(figsize=(1.6 + 0.9 * num_classes, 1.4 + 0.5 * num_experts), layout="constrained")
    axes = figure.subplots()
    brightest = max(1 / num_experts, share_KC.max())
    axes.imshow(share_KC, cmap="viridis", vmin=0, vmax=brightest, aspect="auto")
    axes.set_xticks(range(num_classes), label_names, rotation=30, ha="right", parse_math=False)
    axes.set_yticks(range(num_experts), [f"expert {k}" for k in range(num_experts)])
    for k in range(num_experts):
        for c in range(num_classes):
            dark = share_KC[k, c] < 0.6 * brightest
            axes.text(c, k, f"{share_KC[k, c]:.2f}", ha="center", va="center", color="white" if dark else "black")
    axes.set_title("Mean gate probability by class")
    figure.savefig(path, dpi=150)
