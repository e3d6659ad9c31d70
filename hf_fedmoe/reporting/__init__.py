"""Reports of a run and its result: expert analysis, plots, the model card."""

from .client_differences import ClientDifferences, diagnose
from .client_metrics import (
    ClientScore,
    plot_clients,
    read_client_table,
    score_client,
    summarise_clients,
    write_client_table,
)
from .comparison import RunResult, comparison_table, write_comparison
from .comparison_page import write_comparison_page
from .expert_analysis import ExpertAnalysis, analyse_experts, scores
from .expert_facts import ExpertFacts, read_expert_facts, write_expert_facts
from .gate_heatmap import plot_gate
from .learning_curves import plot_learning_curves
from .metric import COSTS, METRICS, Metric, metric_named
from .model_card import RunFacts, names_of_experts, training_table, write_model_card
from .privacy_facts import ExamplePrivacyFacts, PrivacyFacts


__all__ = [
    "COSTS",
    "METRICS",
    "ClientDifferences",
    "ClientScore",
    "ExamplePrivacyFacts",
    "ExpertAnalysis",
    "ExpertFacts",
    "Metric",
    "PrivacyFacts",
    "RunFacts",
    "RunResult",
    "analyse_experts",
    "comparison_table",
    "diagnose",
    "metric_named",
    "names_of_experts",
    "plot_clients",
    "plot_gate",
    "plot_learning_curves",
    "read_client_table",
    "read_expert_facts",
    "score_client",
    "scores",
    "summarise_clients",
    "training_table",
    "write_client_table",
    "write_comparison",
    "write_comparison_page",
    "write_expert_facts",
    "write_model_card",
]
