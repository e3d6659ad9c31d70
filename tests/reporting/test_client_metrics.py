import csv
import math

import numpy as np
import pytest

from hf_fedmoe.reporting import (
    ClientScore,
    plot_clients,
    read_client_table,
    score_client,
    summarise_clients,
    write_client_table,
)


PROBABILITIES_NC = np.array([[0.6, 0.3, 0.1], [0.7, 0.1, 0.2], [0.2, 0.6, 0.2], [0.1, 0.3, 0.6]])


def table():
    seen = [
        ClientScore(0, "north", False, 5, 10, 0.9, 0.5, 0.8),
        ClientScore(1, 'a "shop", with a comma', False, 5, 30, 0.5, 0.5, 0.6),
    ]
    return [*seen, ClientScore(2, "名前", True, 5, 4, 0.25, 0.1, math.nan)]


def test_one_client_by_hand():
    score = score_client(3, "north", True, 9, PROBABILITIES_NC, np.array([0, 1, 1, 1]))
    assert (score.client, score.name, score.unseen, score.train_size, score.test_size) == (3, "north", True, 9, 4)
    assert score.accuracy == 0.5
    # F1 of class 0: 2 / 3, of 1: 2 * 1 / (2 + 2), of 2: 0.
    assert score.macro_f1 == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    # Class 0: .6 above .7, .2, .1 in 2 of 3 pairs. Class 1: .1, .6, .3 above .3 in 1.5 of 3. Class 2: no example.
    assert score.auc == pytest.approx((2 / 3 + 1 / 2) / 2)


def test_auc_where_it_has_no_value_and_where_it_is_perfect():
    def auc(probabilities_NC, labels):
        return score_client(0, "0", False, 1, probabilities_NC, np.array(labels)).auc

    assert math.isnan(auc(PROBABILITIES_NC, [2, 2, 2, 2]))
    assert math.isnan(auc(PROBABILITIES_NC * np.nan, [0, 1, 2, 2]))
    assert auc(PROBABILITIES_NC, [0, 0, 1, 2]) == 1.0


def test_summary_by_hand():
    summary = summarise_clients(table())
    assert summary["accuracy"] == pytest.approx((10 * 0.9 + 30 * 0.5) / 40)
    assert summary["macro_f1"] == pytest.approx(0.5) and summary["auc"] == pytest.approx((10 * 0.8 + 30 * 0.6) / 40)
    assert math.isnan(summary["unseen_auc"])  # its rows are of one class
    with_one_class = [*table()[:2], ClientScore(3, "3", False, 5, 50, 0.5, 0.5, math.nan)]
    assert summarise_clients(with_one_class)["auc"] == summary["auc"]
    assert summary["bottom_decile"] == pytest.approx(0.5 + 0.1 * 0.4) and summary["worst"] == 0.5
    assert summary["unseen_accuracy"] == summary["unseen_worst"] == summary["unseen_bottom_decile"] == 0.25
    assert not any(name.startswith("unseen") for name in summarise_clients(table()[:2]))


def test_table_as_csv_and_as_picture(tmp_path):
    write_client_table(table(), tmp_path / "run" / "clients.csv")
    with (tmp_path / "run" / "clients.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 and rows[2]["unseen"] == "True" and float(rows[1]["accuracy"]) == 0.5
    # By their text, since no NaN equals another.
    assert repr(read_client_table(tmp_path / "run" / "clients.csv")) == repr(table())
    plot_clients({"fedavg": table(), "local": table()[:2]}, tmp_path / "clients.svg")
    text = (tmp_path / "clients.svg").read_text()
    assert text.startswith("<?xml")


def test_a_table_without_names_is_still_read(tmp_path):
    lines = ["client,unseen,train_size,test_size,accuracy,macro_f1,auc", "7,True,5,4,0.25,0.1,nan"]
    (tmp_path / "old.csv").write_text("\n".join(lines))
    (score,) = read_client_table(tmp_path / "old.csv")
    assert (score.client, score.name, score.unseen, score.test_size) == (7, "7", True, 4)
