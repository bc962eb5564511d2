"""`steer train CONTRAST.jsonl`: steering from contrastive prompts, evaluated on held-out prompts."""

import argparse
import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from steer_service.cli.arguments import UsageError, layers_from
from steer_service.cli.model_choice import (
    ModelChoice,
    OpenModel,
    add_model_arguments,
    model_choice_from,
    open_model,
)
from steer_service.cli.progress import print_message
from steer_service.cli.run_command import run_command
from steer_service.cli.scales import add_scales_argument, scales_from
from steer_service.cli.train_advice import next_steps, same_end, ties
from steer_service.core.errors import InvalidRequest
from steer_service.core.field_checks import check_layer
from steer_service.core.specs import SteeringSpec
from steer_service.directions.contrast import ContrastPair, read_contrast, split_pairs
from steer_service.directions.directions import Direction, Method, find_directions
from steer_service.directions.report import plot_scores, plot_sweep, score_table, sweep_table
from steer_service.directions.rows import DEFAULT_GENERATED, LayerRows, RowChoice, collect_rows, row_choice_from
from steer_service.directions.scores import (
    LayerScore,
    best_score,
    check_pairs,
    cross_validate,
    evaluate_all,
    tied_scores,
)
from steer_service.directions.sweep import sweep_scales
from steer_service.directions.targets import targets_of
from steer_service.directions.training import BATCH_SIZE, EPOCHS, LEARNING_RATE, train
from steer_service.formats.checkpoint import DIRECTIONS, DOCUMENT, TENSORS, save_spec, sha256_of_file
from steer_service.formats.vector_files import write_vectors
from steer_service.hf.model import HFSteeringModel

GRADIENT = "gradient"
"""The method that trains; the others compare captured rows."""

SCORES_PLOT = "scores.png"
SWEEP_PLOT = "sweep.png"

DESCRIPTION = f"""\
Makes steering from contrastive prompts and evaluates it on held-out pairs.

CONTRAST is a file of JSON lines, each {{"positive": ..., "negative": ...}}: texts, or chats as lists of messages. A
chat that ends with an assistant's message is the beginning of a response. A line with chats may have
"continue_final_message", "add_generation_prompt", "chat_template_kwargs" and "tools", which apply to both. A line with
texts that have their BOS token already has "add_special_tokens": false.

  difference  the mean of the positive rows minus that of the negative ones
  pca         the axis along which the two rows of each pair differ most
  probe       the normal of the plane with which logistic regression separates both
  {GRADIENT}    an addition, trained to make the text of the positive prompts more likely

The first three capture the residual stream of each prompt. --rows says where:

  last-prompt     at its last token
  mean-generated  the mean over tokens that are generated from it
  last-message    the mean over the text of a chat's last message, without what the chat template adds
  a position      at that token: 0 is the first one, and --rows=-2 the last but one, such as the A of "(A)"

They save the direction of one layer; its length is the distance between the means of both sides. The layer is chosen by
cross-validation on the training pairs: the highest AUC, and of layers that tie the one nearest to the middle of the
model. So the held-out pairs give a fair result. {GRADIENT} needs the model itself, not a server.

If both texts of a pair end with the same punctuation mark, leave it out: the row at the last token is compared. Begin
with a scale below 1, such as `--scale 0.5`. `--steering FOLDER/{DIRECTIONS} --layer N` tries another layer.

The folder --out gets {DOCUMENT} and {TENSORS} for `steer generate --steering` and `steer_client.load_spec`.
It also gets {DIRECTIONS} with the direction of every layer, and the results as {SCORES_PLOT} and {SWEEP_PLOT}.
"""


Made = tuple[Callable[[float], SteeringSpec], list[str]]
"""Steering as its `to_spec`, and lines that say what to try next."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainJob:
    """The options of the command line."""

    contrast: Path
    """The file of pairs."""
    learned: Sequence[ContrastPair]
    """Pairs to learn from."""
    held_out: Sequence[ContrastPair]
    """Pairs to evaluate on."""
    method: str
    """A `Method`'s value, or GRADIENT."""
    layers: tuple[int, ...] | None
    """Layers to choose from, or to train at; None for all, or for the middle one."""
    choice: ModelChoice
    """The model."""
    out: Path
    """The folder to write."""
    rows: RowChoice | int
    """Which rows represent a prompt."""
    max_tokens: int
    """Tokens to generate for MEAN_GENERATED."""
    scales: tuple[float, ...]
    """Scales at which the effect is measured."""
    training: dict[str, Any]
    """Arguments of `train`."""
    about: dict[str, Any]
    """How the steering was made, for the folder."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `steer train`."""
    parser.description = DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("contrast", metavar="CONTRAST", type=Path, help="the file of contrastive prompts")
    parser.add_argument(
        "--method",
        choices=[*(method.value for method in Method), GRADIENT],
        default=Method.DIFFERENCE.value,
        help="default: %(default)s",
    )
    parser.add_argument("--out", metavar="FOLDER", type=Path, required=True, help="folder to write the steering to")
    parser.add_argument("--overwrite", action="store_true", help="replace the content of the folder")
    add_model_arguments(parser)
    parser.add_argument(
        "--layers",
        metavar="LAYERS",
        help="layers such as 3,7-9 to choose from (default: all), or to train at (default: the middle one)",
    )
    parser.add_argument(
        "--held-out",
        type=float,
        metavar="SHARE",
        default=0.25,
        help="share of the pairs to evaluate on (default: 0.25)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the split and of training (default: %(default)s)")
    parser.add_argument(
        "--rows",
        metavar="ROWS",
        help="last-prompt, mean-generated, last-message or a position such as -2 (default: last-prompt); not for "
        "gradient",
    )
    parser.add_argument(
        "--max-tokens", type=int, help=f"with --rows mean-generated: tokens per prompt (default: {DEFAULT_GENERATED})"
    )
    parser.add_argument("--epochs", type=int, help=f"for gradient: passes over the targets (default: {EPOCHS})")
    parser.add_argument("--batch-size", type=int, help=f"for gradient: targets per step (default: {BATCH_SIZE})")
    parser.add_argument(
        "--learning-rate", type=float, help=f"for gradient: in units of the residual stream (default: {LEARNING_RATE})"
    )
    add_scales_argument(parser)


def run(namespace: argparse.Namespace) -> int:
    """Executes the command line and returns the exit status."""
    return run_command(partial(job_from, namespace), lambda job: asyncio.run(_train(job)))


def job_from(namespace: argparse.Namespace) -> TrainJob:
    """What the command line describes; raises UsageError or InvalidRequest, before any work."""
    _check_options(namespace)
    _check_out(namespace.out, overwrite=namespace.overwrite)
    learned, held_out = _pairs_from(namespace)
    choice = model_choice_from(namespace)
    layers = None if namespace.layers is None else layers_from("--layers", namespace.layers, choice.connection)
    if namespace.method != GRADIENT and (layers is None or len(set(layers)) > 1):
        check_pairs(len(learned))
    training = {name: getattr(namespace, name) for name in ("epochs", "batch_size", "learning_rate")}
    return TrainJob(
        contrast=namespace.contrast,
        learned=learned,
        held_out=held_out,
        method=namespace.method,
        layers=layers,
        choice=choice,
        out=namespace.out,
        rows=row_choice_from(namespace.rows or RowChoice.LAST_PROMPT.value),
        max_tokens=namespace.max_tokens or DEFAULT_GENERATED,
        scales=scales_from(namespace),
        training={name: value for name, value in training.items() if value is not None} | {"seed": namespace.seed},
        about={
            "method": namespace.method,
            "contrast": {"file": namespace.contrast.name, "sha256": sha256_of_file(namespace.contrast)},
            "pairs": {"learned": len(learned), "held_out": len(held_out), "seed": namespace.seed},
        },
    )


def _check_options(namespace: argparse.Namespace) -> None:
    is_gradient = namespace.method == GRADIENT
    for option in ("rows", "max_tokens") if is_gradient else ("epochs", "batch_size", "learning_rate"):
        if getattr(namespace, option) is not None:
            raise UsageError(f"--{option.replace('_', '-')} is not for --method {namespace.method}")
    for option in ("max_tokens", "epochs", "batch_size", "learning_rate"):
        value = getattr(namespace, option)
        if value is not None and not value > 0:
            raise UsageError(f"--{option.replace('_', '-')}: {value} is not above 0")
    if is_gradient and namespace.address is not None:
        raise UsageError("--address: a server has no gradients; --method gradient needs --model")
    if namespace.max_tokens is not None and namespace.rows != RowChoice.MEAN_GENERATED.value:
        raise UsageError(f"--max-tokens needs --rows {RowChoice.MEAN_GENERATED.value}")


def _check_out(out: Path, *, overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out: {out} is not a folder")
    if (out / DOCUMENT).exists() and not overwrite:
        raise UsageError(f"--out: {out} already holds steering; --overwrite replaces it")


def _pairs_from(namespace: argparse.Namespace) -> tuple[list[ContrastPair], list[ContrastPair]]:
    if not namespace.contrast.is_file():
        raise UsageError(f"CONTRAST: {namespace.contrast} is not a file")
    return split_pairs(read_contrast(namespace.contrast), held_out=namespace.held_out, seed=namespace.seed)


async def _train(job: TrainJob) -> int:
    print_message(f"{len(job.learned)} pairs to learn from, {len(job.held_out)} held out")
    if job.method != GRADIENT and job.rows is RowChoice.LAST_PROMPT and (hint := same_end(job.learned)) is not None:
        print_message(hint)
    async with open_model(job.choice) as model:
        _check_layers(job.layers, model.calls.layer_count)
        make = _by_gradient if job.method == GRADIENT else _by_comparison
        spec_at, advice = await make(job, model)
        print_message(f"saved to {job.out}")
        await _sweep(job, model, spec_at)
        for line in advice:
            print_message(line)
    return 0


def _check_layers(layers: Sequence[int] | None, layer_count: int) -> None:
    try:
        for layer in layers or ():
            check_layer(layer, layer_count - 1)
    except InvalidRequest as error:
        raise UsageError(f"--layers: {error.message}; the model has {layer_count} layers") from error


async def _by_comparison(job: TrainJob, model: OpenModel) -> Made:
    """Finds directions, saves that of the best layer and prints all scores."""
    learned, held_out = await _rows_of(job, model, job.learned), await _rows_of(job, model, job.held_out)
    directions = find_directions(Method(job.method), *learned)
    scores = evaluate_all(directions, *held_out)
    layer = _chosen_layer(job, learned, model.calls.layer_count)
    _save_directions(job, model, directions, layer, scores)
    print(score_table(scores), flush=True)
    plot_scores(scores, job.out / SCORES_PLOT)
    return directions[layer].to_spec, next_steps(job.out, job.contrast, job.choice, layer, directions)


async def _rows_of(job: TrainJob, model: OpenModel, pairs: Sequence[ContrastPair]) -> tuple[LayerRows, LayerRows]:
    layers = range(model.calls.layer_count) if job.layers is None else job.layers

    async def side(name: str) -> LayerRows:
        prompts, names = [getattr(pair, name) for pair in pairs], [f"line {pair.line}.{name}" for pair in pairs]
        return await collect_rows(model.calls, prompts, layers, job.rows, max_tokens=job.max_tokens, names=names)

    return await side("positive"), await side("negative")


def _chosen_layer(job: TrainJob, learned: tuple[LayerRows, LayerRows], layer_count: int) -> int:
    if len(learned[0]) == 1:
        return next(iter(learned[0]))
    scores = cross_validate(Method(job.method), *learned)
    best, tied = best_score(scores, layer_count), tied_scores(scores)
    print_message(f"layer {best.layer} is the best on the training pairs (cross-validated AUC {best.auc:.3f})")
    if len(tied) > 1:
        print_message(ties(best.layer, tied, layers=len(scores), pairs=len(job.learned)))
    return best.layer


def _save_directions(
    job: TrainJob, model: OpenModel, directions: dict[int, Direction], layer: int, scores: Sequence[LayerScore]
) -> None:
    score = next(score for score in scores if score.layer == layer)
    about = job.about | {
        "rows": job.rows.value if isinstance(job.rows, RowChoice) else job.rows,
        "held_out": {"auc": score.auc, "accuracy": score.accuracy},
    }
    save_spec(job.out, directions[layer].to_spec(), model=model.calls.info, revision=model.revision, about=about)
    vectors = {layer: direction.vector for layer, direction in directions.items()}
    write_vectors(job.out / DIRECTIONS, vectors, kind="safetensors")


async def _by_gradient(job: TrainJob, model: OpenModel) -> Made:
    """Trains an addition at each layer and saves it."""
    assert isinstance(model.calls, HFSteeringModel), "the command line with a server was refused"
    targets = targets_of(job.learned)
    for layer in (model.calls.layer_count // 2,) if job.layers is None else job.layers:
        model.calls.set_steering_vector(layer, [0.0] * model.calls.hidden_size)
    losses = train(model.calls, targets, **job.training)
    print_message(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} nats per token, in {len(losses)} steps")
    model.calls.save_steering(job.out, about=job.about | {"loss": [losses[0], losses[-1]]} | job.training)
    return model.calls.to_spec, []


async def _sweep(job: TrainJob, model: OpenModel, spec_at: Callable[[float], SteeringSpec]) -> None:
    """Prints the effect on the texts of the held-out positive prompts."""
    try:
        targets = targets_of(job.held_out)
    except InvalidRequest as error:
        print_message(f"the effect on texts is not measured: {error}")
        return
    points = await sweep_scales(model.measure(targets), spec_at, job.scales)
    print(sweep_table(points), flush=True)
    plot_sweep(points, job.out / SWEEP_PLOT)
