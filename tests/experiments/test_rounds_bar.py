"""One bar for the rounds of runs in other processes."""

import time

import pytest

from hf_fedmoe.experiments.noted_rounds import NotesRounds, noted_round
from hf_fedmoe.experiments.rounds_bar import RoundsBar
from hf_fedmoe.experiments.runs import Run
from hf_fedmoe.experiments.side_by_side import SideBySide
from hf_fedmoe.training import FederatedTrainer
from tests.tiny_federation import tiny_args, tiny_expert, tiny_federation


def a_run(folder, method="fedavg", seed=0):
    settings = {"dataset": ["digits"], "model": ["small_cnn"], "rounds": 4, "use_cpu": True}
    return Run(method, "images", method, settings, seed, folder / method)


def test_a_run_notes_its_rounds(tmp_path):
    assert noted_round(tmp_path / "notes") is None
    trainer = FederatedTrainer(tiny_expert(), tiny_args(tmp_path / "run", rounds=2), tiny_federation())
    trainer.add_callback(NotesRounds(tmp_path / "notes"))
    trainer.train()
    assert noted_round(tmp_path / "notes") == 2
    (tmp_path / "notes" / "round.txt").write_text("")  # as a reader may find it
    assert noted_round(tmp_path / "notes") == 0


def test_the_bar_counts_what_has_ended_and_what_is_running(tmp_path, capsys):
    runs = [a_run(tmp_path, method) for method in ("majority_class", "fedavg", "fedprox")]
    with RoundsBar(runs) as bar:
        assert bar._bar.total == 8
        bar.try_out([runs])
        assert bar._bar.n == 0 and bar._bar.postfix == "trying 3 runs out, data and models"
        bar.end(runs[0], "1 of 3: majority_class")
        assert bar._bar.n == 0
        runs[1].folder.mkdir()
        (runs[1].folder / "round.txt").write_text("3")
        bar.watch(runs[1:])
        assert bar._bar.n == 3 and bar._bar.postfix == "fedavg, seed 0 3/4; fedprox, seed 0 prepares"
        runs[2].folder.mkdir()
        (runs[2].folder / "round.txt").write_text("0")  # its first round is under way
        bar.watch(runs[1:])
        assert bar._bar.n == 3 and bar._bar.postfix == "fedavg, seed 0 3/4; fedprox, seed 0 0/4"
        bar.end(runs[1], "2 of 3: fedavg")
        assert bar._bar.n == 4
    assert capsys.readouterr().out == "1 of 3: majority_class\n2 of 3: fedavg\n"


@pytest.fixture
def watched_often(monkeypatch, warm_processes):
    monkeypatch.setattr("hf_fedmoe.experiments.side_by_side.WATCHED_EVERY", 0.05)


def test_tasks_at_work_are_watched(watched_often):
    seen: list[list[float]] = []
    with SideBySide(2) as processes:
        assert all(failure is None for _, failure in processes.run(time.sleep, [0.6, 0.7, 0.8], seen.append))
    # Which of the last two is seen alone is the machine's affair.
    assert [0.6, 0.7] in seen and 0.8 in seen[-1] and max(map(len, seen)) == 2
