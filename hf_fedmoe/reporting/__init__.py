"""What a run and its result look like: expert analysis, plots, the model card."""

from .expert_analysis import ExpertAnalysis, analyse_experts, scores
from .gate_heatmap import plot_gate


__all__ = ["ExpertAnalysis", "analyse_experts", "plot_gate", "scores"]
