"""Tables over seeds, by hand."""

from hf_fedmoe.reporting import Metric, RunResult, comparison_table, write_comparison


RESULTS = {
    "FedAvg": [
        RunResult(s, {"accuracy": a, "megabytes_up": 1.5}, [(1, 0.25), (2, a)]) for s, a in ((0, 0.5), (1, 0.7))
    ],
    "Fed-MoE": [
        RunResult(s, {"accuracy": a, "megabytes_up": 3.0, "main_expert_accuracy": 0.4}, [])
        for s, a in ((0, 0.6), (1, 0.7))
    ],
}


def test_means_spreads_parts_and_wins():
    table = comparison_table(
        RESULTS, ["accuracy", "megabytes_up"], ["main_expert", "oracle_expert"], "Fed-MoE", {"FedAvg": "51.44"}
    )
    assert table.split("\n") == [
        "| | accuracy | MB up in a round | Fed-MoE above, of seeds | published |",
        "|---|---|---|---|---|",
        "| FedAvg | 60.0 ± 14.1 | 1.50 ± 0.00 | 1 / 2 | 51.44 |",
        "| Fed-MoE | 65.0 ± 7.1 | 3.00 ± 0.00 |  |  |",
        "| — main expert | 40.0 ± 0.0 |  |  |  |",
    ]


def test_a_reference_without_the_figure_is_better_on_no_seed():
    rows = {"base": [RunResult(0, {"f1": 0.5})], "other": [RunResult(0, {"accuracy": 0.5})]}
    assert comparison_table(rows, ["accuracy"], reference="base").split("\n")[3] == "| other | 50.0 | 0 / 1 |"


def test_the_lower_one_wins_where_lower_is_better_and_units_are_a_metrics_own():
    metrics = {
        "bits_per_byte": Metric("bits per byte", 1, 3, lower_is_better=True),
        "tokens_per_second": Metric("tokens a second", 1, 0),
    }
    rows = {
        name: [
            RunResult(seed, {"bits_per_byte": bits, "tokens_per_second": 1500.0}) for seed, bits in enumerate(found)
        ]
        for name, found in {"mixture": (2.5, 2.75), "fedavg": (2.625, 2.5)}.items()
    }
    table = comparison_table(rows, [*metrics], reference="mixture", metrics=metrics)
    assert table.split("\n") == [
        "| | bits per byte | tokens a second | mixture below, of seeds |",
        "|---|---|---|---|",
        "| mixture | 2.625 ± 0.177 | 1500 ± 0 |  |",
        "| fedavg | 2.562 ± 0.088 | 1500 ± 0 | 1 / 2 |",
    ]


def test_what_is_missing_is_empty():
    one = {"a": [RunResult(3, {"accuracy": 0.5})], "b": [RunResult(3, {"accuracy": float("nan")})]}
    assert comparison_table(one, ["accuracy", "auc"]).split("\n")[2:] == ["| a | 50.0 |  |", "| b |  |  |"]


def test_names_of_rows_stay_in_their_cell():
    rows = {"a | b": [RunResult(0, {"accuracy": 0.5})], "<b>\nc": [RunResult(0, {"accuracy": 0.25})]}
    table = comparison_table(rows, ["accuracy"], reference="a | b", published={"a | b": "5|6"})
    assert table.split("\n") == [
        "| | accuracy | a &#124; b above, of seeds | published |",
        "|---|---|---|---|",
        "| a &#124; b | 50.0 |  | 5&#124;6 |",
        "| &#60;b&#62; c | 25.0 | 1 / 1 |  |",
    ]


def test_every_run_is_a_line_of_the_csv(tmp_path):
    write_comparison(RESULTS, tmp_path / "results.csv")
    assert (tmp_path / "results.csv").read_text().split("\n")[:4] == [
        "method,seed,accuracy,megabytes_up,main_expert_accuracy",
        "FedAvg,0,0.5,1.5,",
        "FedAvg,1,0.7,1.5,",
        "Fed-MoE,0,0.6,3.0,0.4",
    ]
