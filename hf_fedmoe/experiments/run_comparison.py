"""
Methods side by side over seeds, from one YAML: equal clients, reserved sets, initial weights, draws and local steps.

Every run has a folder of its own. A finished one is only read again, one that was stopped goes on from its last
checkpoint, and one that fails leaves the others alone.
"""

import heapq
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..data.counted import counted
from ..data.sources import DATA_FOLDER_VARIABLE, WITH_PACKAGES
from ..reporting import (
    ClientScore,
    Metric,
    RunResult,
    comparison_table,
    plot_clients,
    plot_learning_curves,
    read_client_table,
    write_comparison,
    write_comparison_page,
)
from ..training import FedMoETrainingArguments
from ..training.client_evaluation import CLIENT_TABLE_NAME
from .amounts import time_in_words
from .classifier_experiment import ClassifierExperiment
from .comparison import KINDS, Comparison, check_seeds, check_settings, read_comparison
from .experiment import Experiment
from .folders import check_writable, claim_folder, folder_of
from .kind import Kind
from .methods import has_begun
from .named_strategies import STRATEGIES, load_plugin
from .rehearsal import FOLDER
from .rounds_bar import RoundsBar
from .runs import FORECAST, NO_MATTER, Run, execute, rehearse_run, try_out
from .settings import Setting, nearest, read_preset, settings_of, typed_settings
from .side_by_side import Failure, SideBySide


class FailedRunsError(RuntimeError):
    """
    Raised at the end of a comparison in which runs failed. What was finished is written.

    Args:
        table (`str`): The table of the runs that were finished; it says which failed, and why.
    """

    def __init__(self, table: str):
        super().__init__(table)
        self.table = table


def plan_runs(
    comparison: Comparison, where: Path, out: Path, size: str | None = None, overrides: dict[str, Any] | None = None
) -> dict[str, list[Run]]:
    """
    The runs by row of the table. Raises `ValueError` when a method or setting is wrong, before anything is trained.

    Args:
        comparison ([`Comparison`]): What to run.
        where (`Path`): The folder that `recipe` is relative to.
        out (`Path`): Folder of the runs.
        size (`str`, *optional*): One of `comparison.sizes`.
        overrides (`dict`, *optional*): Settings that go before all others; values may be texts of a command line.
    """
    kind = KINDS[comparison.kind]
    known = settings_of(kind.experiment_class, FedMoETrainingArguments)
    common, with_lora = common_settings(comparison, where, size)
    _check_kind(comparison, common, known)
    common, with_lora = typed_settings(common, known), typed_settings(with_lora, known)
    check_settings("The command line", overrides or {})
    overrides = typed_settings(overrides or {}, known, ("size", "seeds", "rows", "jobs", "out"))
    of_rows = comparison.sizes[size].get("methods", {}) if size else {}
    runs: dict[str, list[Run]] = {}
    possible: dict[str, tuple[str, Experiment]] = {}
    for row, given in comparison.methods.items():
        try:
            method, own, differing = _of_row(kind, given | of_rows.get(row, {}), known)
            differing |= overrides
            rates = with_lora if (common | differing).get("peft") == "lora" else {}
            settings = common | rates | differing | {"method_settings": {method: own} if own else {}}
            folder = out / folder_of(row)
            runs[row] = [
                Run(row, comparison.kind, method, settings, seed, folder / f"seed-{seed}") for seed in comparison.seeds
            ]
            experiment, args = runs[row][0].parse()
            if method != kind.untrained:
                kind.check_method(method, experiment, args)
            possible[row] = method, experiment
        except ValueError as error:
            raise ValueError(f"The row {row!r}: {error}") from error
    by_folder: dict[Path, str] = {}
    for row, row_runs in runs.items():
        other = by_folder.setdefault(row_runs[0].folder, row)
        if other != row:
            raise ValueError(
                f"`methods` has rows that differ in signs or case only, {other!r} and {row!r}: rename one."
            )
    _check_columns(comparison, possible)
    return runs


def common_settings(comparison: Comparison, where: Path, size: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """
    The settings of all rows, and those in their place where experts are adapters: the recipe's, the comparison's and
    the size's, each going before the one before.
    """
    if size is not None and size not in comparison.sizes:
        raise ValueError(f"`size` is {size!r}: this comparison has {', '.join(comparison.sizes) or 'one size only'}.")
    chosen = dict(comparison.sizes[size]) if size else {}
    chosen.pop("methods", None)
    preset = chosen.pop("recipe_preset", None)
    if preset is not None and not comparison.recipe:
        raise ValueError(f"`recipe_preset` is {preset!r}, but the comparison names no `recipe`: name its YAML.")
    taken = read_preset(where / comparison.recipe, preset or "quick", "recipe_preset") if comparison.recipe else {}
    taken.pop("compare", None)
    common = taken | comparison.settings | chosen
    return common, common.pop("with_lora", {})


def _of_row(
    kind: Kind, given: dict[str, Any], known: dict[str, Setting]
) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """A row's method, the settings of its strategy, and the others."""
    given = dict(given)
    method = given.pop("method")
    own = kind.own_settings(method)
    differing = {name: value for name, value in given.items() if name not in own}
    for name in differing.keys() - known.keys():
        if having := [other for other in STRATEGIES if name in kind.own_settings(other)]:
            raise ValueError(f"{method!r} has no setting {name!r}, which is one of {', '.join(having)}.")
        if own and not get_close_matches(name, known):
            raise ValueError(f"{method!r} has no setting {name!r}: its own are {', '.join(own)}.")
    of_strategy = typed_settings({name: given[name] for name in own if name in given}, own)
    return method, of_strategy, typed_settings(differing, known)


def _check_kind(comparison: Comparison, names: Iterable[str], known: dict[str, Setting]) -> None:
    """Raises `ValueError` for a setting that only experiments of another kind have."""
    for name in names:
        having = [other for other, kind in KINDS.items() if name in settings_of(kind.experiment_class)]
        if name not in known and having:
            raise ValueError(
                f"`kind` is {comparison.kind!r}, which has no setting {name!r}: it is one of {' and '.join(having)}."
            )


def _check_columns(comparison: Comparison, possible: dict[str, tuple[str, Experiment]]) -> None:
    kind = KINDS[comparison.kind]
    metrics = list(dict.fromkeys(name for method, told in possible.values() for name in kind.metrics(method, told)))
    parts = {name for method, told in possible.values() for name in kind.part_names(method, told)}
    numbered = ("expert_", "top_")  # too many to list
    for name in comparison.columns:
        if name not in metrics:
            listed = [metric for metric in metrics if not metric.startswith(numbered)]
            remedy = ""
            if name.startswith("clients_"):
                remedy = " Clients are tested with a `client_test_share`, unseen ones with an `unseen_share` as well."
            raise ValueError(f"`columns` has {name!r}, which no row will have{nearest(name, listed)}{remedy}")
    for name in comparison.parts:
        if name not in parts:
            listed = [part for part in sorted(parts) if not part.startswith(numbered)]
            raise ValueError(f"`parts` has {name!r}, which no row will have{nearest(name, listed)}{kind.remedy(name)}")
    if (row := comparison.reference) is not None and comparison.columns[0] not in kind.metrics(*possible[row]):
        raise ValueError(
            f"`reference` is {row!r}, which has no {comparison.columns[0]!r}, the first of `columns`, by which seeds "
            "are counted: choose another row, or put another column first."
        )


def run_all(runs: dict[str, list[Run]], num_jobs: int) -> list[tuple[Run, Failure]]:
    """
    Trains what is not finished yet. Everything is made up to its training before the first run trains.

    Returns:
        `list[tuple[Run, Failure]]`: The runs that failed.

    Raises:
        `ValueError`: When a finished run had other settings, or something cannot be made.
    """
    waiting = [run for row_runs in runs.values() for run in row_runs if run.stored() is None]
    # Two processes that wait for one another's threads take many times as long.
    threads = int(os.environ.get("OMP_NUM_THREADS", max(1, (os.cpu_count() or 1) // num_jobs)))
    for run in waiting:
        run.threads = threads
    # Seed by seed, so that a table of few seeds is there early.
    waiting.sort(key=lambda run: run.seed)
    failed = []
    with SideBySide(num_jobs) as processes, RoundsBar(waiting) as bar:
        for _, failure in processes.run(try_out, [waiting] if waiting else [], bar.try_out):
            if failure and failure.refused:
                raise ValueError(failure.reason)
            if failure:
                raise RuntimeError(failure.details or failure.reason)
        _rehearse(waiting, processes, bar)
        for number, (run, failure) in enumerate(processes.run(execute, waiting, bar.watch), start=1):
            bar.end(run, f"{number} of {len(waiting)}: {run}{f' failed: {failure.reason}' if failure else ''}")
            details = run.folder / "error.txt"
            if failure:
                failed.append((run, failure))
                run.folder.mkdir(parents=True, exist_ok=True)
                details.write_text(f"{failure.reason}\n\n{failure.details}")
            else:
                details.unlink(missing_ok=True)
    return failed


def _rehearse(waiting: list[Run], processes: SideBySide, bar: RoundsBar) -> None:
    """Tells how long the rows take that ask for it and have not begun, each by a rehearsal of its first seed."""
    firsts: dict[str, Run] = {}
    for run in waiting:
        experiment = run.parse()[0]
        asks = isinstance(experiment, ClassifierExperiment) and experiment.rehearse
        if asks and run.trains and not has_begun(str(run.folder)):
            firsts.setdefault(run.row, run)
    if not firsts:
        return
    seconds: dict[str, float] = {}
    # On the disk that the runs will write to. One that was killed leaves it behind.
    scratch = waiting[0].folder.parents[1] / FOLDER
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        tasks = [replace(run, folder=scratch / folder_of(row)) for row, run in firsts.items()]
        for run, failure in processes.run(rehearse_run, tasks, bar.rehearse):
            if failure:
                bar.say(f"{run.row}: no forecast, {failure.reason}")
                continue
            forecast = json.loads((run.folder / FORECAST).read_text())
            seconds[run.row] = forecast["seconds"]
            bar.say(f"{run.row} takes {forecast['told']}.")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    told = [run for run in waiting if run.row in seconds]
    if told:
        total = side_by_side([seconds[run.row] for run in told], processes.num_processes)
        bar.say(f"{counted(len(told), 'run')} of these rows: about {time_in_words(total)} in all.")


def side_by_side(seconds: list[float], num_processes: int) -> float:
    """Returns when the last task has ended, if each is begun by the process that is free first."""
    ends = [0.0] * num_processes
    for each in seconds:
        heapq.heapreplace(ends, ends[0] + each)
    return max(ends)


def compare(
    path: str | Path,
    out: str | Path | None = None,
    size: str | None = None,
    seeds: list[int] | None = None,
    rows: list[str] | None = None,
    num_jobs: int = 1,
    overrides: dict[str, Any] | None = None,
) -> str:
    """
    Runs a comparison and writes `table.md`, `results.csv` and `comparison.html` into its folder, all in one. Where
    rounds are evaluated there is `curves.png`, and where clients have test rows `clients.png`: how each method serves
    the clients, those of all seeds together.

    Args:
        path (`str` or `Path`): The YAML, see [`Comparison`].
        out (`str` or `Path`, *optional*): The folder; `runs/compare/<name of the YAML>/<size>` if left out.
        size (`str`, *optional*): One of its `sizes`; the first if left out.
        seeds (`list[int]`, *optional*): In the place of its own.
        rows (`list[str]`, *optional*): Of its methods, only these are trained; others stay in the table where they are
            finished.
        num_jobs (`int`, *optional*, defaults to 1): Runs side by side.
        overrides (`dict`, *optional*): Settings that go before those of the YAML.

    Returns:
        `str`: The table.

    Raises:
        `ValueError`: When the YAML, a method or a setting is wrong, before anything is trained.
        [`FailedRunsError`]: After everything else was trained and written, when a run failed.
    """
    path = Path(path)
    if plugin := (overrides or {}).get("plugin"):
        load_plugin(str(plugin))  # before rows name its methods
    comparison = read_comparison(path)
    if seeds is not None:
        check_seeds(seeds)
        comparison.seeds = seeds
    for row in rows or []:
        if row not in comparison.methods:
            raise ValueError(f"There is no row {row!r}: {path.name} has {', '.join(map(repr, comparison.methods))}.")
    if num_jobs < 1:
        raise ValueError(f"`--jobs` is {num_jobs}: give at least 1.")
    size = size or next(iter(comparison.sizes), None)
    out = Path(out or Path("runs", "compare", path.stem, size or ""))
    runs = plan_runs(comparison, path.parent, out, size, overrides)
    metrics = _metrics_of(runs)
    check_writable(out, "--out")
    common, with_lora = common_settings(comparison, path.parent, size)
    common = {name: value for name, value in common.items() if name not in NO_MATTER} | {"with_lora": with_lora}
    claim_folder(out, {"file": path.name, "kind": comparison.kind, "size": size}, common)
    left_out = ""
    if rows:
        runs, left_out = _with_finished_rows(runs, rows)
    try:
        failed = run_all(runs, num_jobs)
    except ValueError as error:
        raise ValueError(f"{error}{_other_sizes(comparison, path.parent, str(error))}") from error
    results = {row: [result for run in row_runs if (result := run.result())] for row, row_runs in runs.items()}
    reference = comparison.reference if comparison.reference and results.get(comparison.reference) else None
    told = (comparison.columns, comparison.parts, reference, comparison.published, metrics)
    table = comparison_table(results, *told)
    table += _below_the_table(comparison, size) + left_out
    if failed:
        lines = [f"- {run}: {failure.reason} ({run.folder / 'error.txt'})" for run, failure in failed]
        table += "\n\nThese runs failed and are left out; the same command tries them again:\n\n" + "\n".join(lines)
    (out / "table.md").write_text(table + "\n")
    finished: dict[str, list[RunResult]] = {row: found for row, found in results.items() if found}
    write_comparison(finished, out / "results.csv")
    pictures = {}
    if any(run.curve for found in finished.values() for run in found):
        pictures["Learning curves"] = out / "curves.png"
        watched = metrics[KINDS[comparison.kind].columns[0]]
        plot_learning_curves(finished, pictures["Learning curves"], reference, watched)
    if tables := _client_tables(runs):
        pictures["Clients"] = out / "clients.png"
        plot_clients(tables, pictures["Clients"])
    title = " ".join(filter(None, (path.stem, size)))
    write_comparison_page(out / "comparison.html", title, table, pictures)
    if failed:
        raise FailedRunsError(table)
    return table


def _with_finished_rows(runs: dict[str, list[Run]], rows: list[str]) -> tuple[dict[str, list[Run]], str]:
    """Keeps some rows, and of the others what is finished; tells what of it has other settings, and is left out."""
    kept, others = {}, []
    for row, row_runs in runs.items():
        if row in rows:
            kept[row] = row_runs
        elif changed := sorted({name for run in row_runs for name in run.changed()}):
            others.append(f"- {row}: another {', '.join(changed)}")
        elif finished := [run for run in row_runs if run.stored()]:
            kept[row] = finished
    told = "\n\nThese rows are finished with other settings and are left out:\n\n" + "\n".join(others)
    return kept, told if others else ""


def _below_the_table(comparison: Comparison, size: str | None) -> str:
    """Returns what a reader of published figures has to know: of what the others are, and what the paper claims."""
    lines = []
    if comparison.published:
        seeds = f"{'Seed' if len(comparison.seeds) == 1 else 'Seeds'} {', '.join(map(str, comparison.seeds))}"
        lines.append(
            f"{seeds}{f', size {size}' if size else ''}. The last column is the paper's, of its own data and size: "
            "compare the order of the rows, not the figures."
        )
    if comparison.claim:
        lines.append(f"The paper's claim: {comparison.claim}")
    return "\n\n" + "\n".join(lines) if lines else ""


def _other_sizes(comparison: Comparison, where: Path, problem: str) -> str:
    """Names the sizes whose data come with packages, where a problem is that there is no folder of data."""
    if f"{DATA_FOLDER_VARIABLE} is not set" not in problem:
        return ""
    needless = [
        f"`--size {size}`"
        for size in comparison.sizes
        if {*WITH_PACKAGES}.intersection(common_settings(comparison, where, size)[0].get("dataset", ()))
    ]
    return f" Without data there is {' or '.join(needless)}, of what comes with packages." if needless else ""


def _metrics_of(runs: dict[str, list[Run]]) -> dict[str, Metric]:
    """The metrics that any of the rows has."""
    found: dict[str, Metric] = {}
    for first, *_ in runs.values():
        found |= KINDS[first.kind].metrics(first.method, first.parse()[0])
    return found


def _client_tables(runs: dict[str, list[Run]]) -> dict[str, list[ClientScore]]:
    """The scores of all seeds' clients by row, of the rows that have some."""
    tables = {}
    for row, row_runs in runs.items():
        files = [run.folder / CLIENT_TABLE_NAME for run in row_runs]
        if scores := [score for file in files if file.is_file() for score in read_client_table(file)]:
            tables[row] = scores
    return tables
