"""The command line: ``athena data | train | sweep | report | claims``."""

import logging
from pathlib import Path
from typing import Annotated

import torch
import typer

from athena import UnsupportedLayer, experiments
from athena.book import tables
from athena.experiments import claims, data, statistics, training

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)

StudyFile = Annotated[
    Path, typer.Argument(help="A study, such as studies/mnist-factors.toml", exists=True, dir_okay=False)
]
Device = Annotated[str | None, typer.Option(help="Where to train: cpu, cuda; by default a GPU if there is one")]


@app.command("data")
def show_data(
    download: Annotated[bool, typer.Option("--download", help="Fetch what is missing into $ATHENA_DATA")] = False,
) -> None:
    """Shows which data sets are here, from where, and their fingerprints."""
    typer.echo(f"In {data.folder()}:")
    table = data.inventory(download)
    typer.echo(table.to_string(index=False))
    if download and not table["here"].all():
        missing = table.loc[~table["here"], "name"]
        raise data.MissingData(f"these could not be had: {', '.join(missing)}; the column `note` says why")


@app.command()
def train(
    model: str = "mlp",
    dataset: str = "mnist",
    fraction: Annotated[float, typer.Option(help="Share of the training set, above 0 and at most 1")] = 0.05,
    factor: Annotated[float, typer.Option(help="The LRP factor; 0 trains plainly")] = 0.0,
    target: Annotated[str, typer.Option(help="Where relevance starts")] = "predicted",
    scope: Annotated[str, typer.Option(help="Which layers are guided: all, linear, convolutional")] = "linear",
    rule: Annotated[str, typer.Option(help="How relevance is shared out")] = "Epsilon(1e-6)",
    epochs: int = 3,
    seed: int = 0,
    device: Device = None,
) -> None:
    """Trains one network and prints its accuracy after each epoch."""
    run = training.Run(model, dataset, fraction, factor, seed, epochs, rule, target, scope)
    _check(device)
    result = training.train(run, device)
    for epoch, accuracy in enumerate(result.accuracy, 1):
        typer.echo(f"epoch {epoch}: {accuracy:.2%} of the test set")
    typer.echo(f"{result.seconds:.1f} s of training on {result.device}")
    if result.diverged:
        typer.echo(f"diverged in step {result.diverged['step']}, at {result.diverged['layer']}")


def _check(device: str | None) -> None:
    """Whether there is such a device, and tensors on it hold numbers."""
    if device is not None:
        try:
            torch.ones(1, device=device).tolist()
        except Exception as error:  # each kind of device has errors of its own
            raise ValueError(f"--device {device}: {(str(error) or type(error).__name__).splitlines()[0]}") from error


@app.command()
def sweep(
    study: StudyFile,
    workers: Annotated[int | None, typer.Option(help="Processes; by default as many as the cores allow")] = None,
    dask: Annotated[str | None, typer.Option(help="Train on the workers of this Dask scheduler instead")] = None,
    device: Device = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Take no run over from another study's results")] = False,
) -> None:
    """Runs what is missing of a study, cheapest first. Stop it when you like; the same command goes on.

    A run that another study has measured is taken over, and said so, but for --fresh.
    """
    plan = experiments.Study.read(study)
    if dask is None:
        _check(device)
    there = [] if fresh else sorted(plan.store.path.parent.glob("*.jsonl"))
    others = [experiments.Store(path) for path in there if path != plan.store.path]
    experiments.sweep(plan.runs, plan.store, workers=workers, dask=dask, device=device, also=others)
    typer.echo(f"{plan.store.path}: {len(plan.runs)} runs")


@app.command()
def report(
    study: StudyFile,
    any_code: Annotated[bool, typer.Option("--any-code", help="Pair runs of two versions of the code too")] = False,
) -> None:
    """Prints what a study has measured so far, beside the thesis's table where it repeats one.

    p_holm is corrected over all rows of the table. "detectable" is the difference that the pairs would have shown with
    a probability of 80 %.
    """
    plan = experiments.Study.read(study)
    done = experiments.results(plan.name)
    done = done[done["key"].isin({run.key for run in plan.runs})]
    typer.echo(f"{plan.title}\n{plan.question.strip()}\n\n{len(done)} of {len(plan.runs)} runs.\n")
    table = statistics.compare(done, any_code=any_code)
    table["verdict"] = [statistics.verdict(row) for _, row in table.iterrows()]
    if plan.thesis_table:
        table = tables.by_share(table, done)
        table = statistics.beside(table, experiments.published("accuracy").query("table == @plan.thesis_table"))
    typer.echo(tables.in_percent(table).to_string(index=False))


@app.command("claims")
def show_claims() -> None:
    """Prints a verdict for each claim of the thesis, from the stored runs, in points of accuracy."""
    table = claims.claims().drop(columns=["section", "controls"])
    typer.echo(table.round(3).to_string(index=False, na_rep="", max_colwidth=60))


def main() -> None:
    """Runs the command line; what a user can mend is printed as one message, without a traceback."""
    logging.getLogger("distributed").setLevel(logging.WARNING)
    try:
        app()
    except (
        *(data.DataError, experiments.StoreError, experiments.SweepError, UnsupportedLayer),
        *(ValueError, FileNotFoundError),
    ) as error:
        typer.echo(f"athena: {error}", err=True)
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
