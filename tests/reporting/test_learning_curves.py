"""The curves of a comparison: who is drawn where, and by what values."""

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.legend import Legend

from hf_fedmoe.reporting import Metric, RunResult, plot_learning_curves


def runs(*curves):
    sent = {"megabytes_up": 1.5, "megabytes_down": 0.5}
    return [RunResult(seed, sent, list(enumerate(curve, start=1))) for seed, curve in enumerate(curves)]


@pytest.fixture
def axes(monkeypatch):
    """Keeps the panels of the figures that are saved."""
    found = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, dpi: found.append(figure.axes))
    return found


def test_seeds_are_thin_lines_around_their_mean_over_rounds_and_megabytes(axes):
    plot_learning_curves({"FedAvg": runs([0.2, 0.4], [0.4, 0.6, 0.9])}, "curves.png")
    by_round, by_megabytes = axes[0]
    for panel, x_N in ((by_round, [1, 2]), (by_megabytes, [2, 4])):
        lines = panel.get_lines()
        assert [line.get_linewidth() for line in lines] == [1.8, 0.6, 0.6]
        assert all(np.allclose(line.get_xdata(), x_N) for line in lines)
        assert np.allclose([line.get_ydata() for line in lines], [[30, 50], [20, 40], [40, 60]])
    assert by_megabytes.get_xlabel().startswith("MB")


def test_the_reference_is_in_every_panel_and_who_has_no_curve_in_none(axes):
    results = {f"m{k}": runs([0.1 * k]) for k in range(6)} | {"best": runs([0.9]), "none": runs([])}
    plot_learning_curves(results, "curves.png", "best")
    shown = [{text.get_text() for text in panel.get_legend().get_texts()} for panel in axes[0][:2]]
    assert shown == [{"best", "m0", "m1", "m2", "m3"}, {"best", "m4", "m5"}]
    assert {line.get_color() for line in axes[0][0].get_lines() if line.get_ydata()[0] == 90} == {"black"}


def test_another_metric_has_its_own_unit_and_who_sends_no_model_no_curve_by_megabytes(axes):
    bits = Metric("bits per byte", 1, 3, lower_is_better=True)
    pooled = [RunResult(0, {}, [(1, 2.5)])]
    plot_learning_curves({"FedAvg": runs([3.0, 2.75])}, "curves.png", metric=bits)
    plot_learning_curves({"pooled": pooled}, "curves.png", metric=bits)
    (by_round, by_megabytes), (_, without) = axes
    assert by_round.get_ylabel() == "Validation bits per byte of the server's model"
    assert np.allclose(by_round.get_lines()[0].get_ydata(), [3.0, 2.75])
    assert by_round.get_legend()._loc == Legend.codes["upper right"]
    assert np.allclose(by_megabytes.get_lines()[0].get_xdata(), [2, 4])
    assert np.isnan(without.get_lines()[0].get_xdata()).all()


def test_money_is_no_formula(tmp_path):
    plot_learning_curves({"$5 and $\\frac": runs([0.25, 0.5])}, tmp_path / "curves.svg")
    assert (tmp_path / "curves.svg").stat().st_size > 10_000


@pytest.mark.filterwarnings("error:constrained_layout")
def test_every_name_is_in_the_legend_and_leaves_room_for_the_curves(axes, tmp_path):
    names = {"_mine": " _mine", "x" * 400: "\n".join(["x" * 40] * 5)}
    plot_learning_curves({name: runs([0.25, 0.5]) for name in names}, tmp_path / "curves.svg")
    panel = axes[0][0]
    assert [text.get_text() for text in panel.get_legend().get_texts()] == list(names.values())
    panel.figure.draw_without_rendering()  # or the warning of a layout without room
