"""What a run and its result look like: expert analysis, plots, the model card."""

from .expert_analysis import ExpertAnalysis, analyse_experts, scores
from .gate_heatmap import plot_gate
from .model_card import RunFacts, write_model_card


__all__ = ["ExpertAnalysis", "RunFacts", "analyse_experts", "plot_gate", "scores", "write_model_card"]
