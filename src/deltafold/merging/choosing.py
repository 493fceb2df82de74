"""`merge` with what is measured: numbers searched, scores of all models, the result as an archive."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from deltafold.archive import is_archive
from deltafold.errors import NonFiniteError, UsageError, nearest
from deltafold.evaluation.loading import choose_device, choose_dtype, load_tokenizer
from deltafold.evaluation.plan import DEFAULT_ANSWERS, Request
from deltafold.evaluation.scoring import Metrics, Scoring, best_of, mean_loss, share_right
from deltafold.merging.as_archive import merge_to_archive
from deltafold.merging.merge import merge as merge_verb
from deltafold.merging.recipe import Recipe
from deltafold.merging.search import Formed
from deltafold.running.devices import computes
from deltafold.running.engine import Progress, Step
from deltafold.running.record import Meter, Record, record_path, write_record
from deltafold.running.stored import storable

# The papers' values: Yadav et al. 2023 and Yang et al. 2025 (ImPart, table 8).
USUAL: dict[str, tuple[float, ...]] = {
    "scale": (0.4, 0.6, 0.8, 1.0, 1.2),
    "density": (0.2, 0.4, 0.6, 0.8),
}


@storable
@computes
def merge(
    base: str | Path,
    recipe: Recipe,
    output: str | Path,
    *,
    search: Mapping[str, Sequence[float]] | None = None,
    search_on: Sequence[str | Path] = (),
    tasks: Sequence[str | Path] = (),
    texts: Sequence[str | Path] = (),
    limit: int | None = None,
    answers: int = DEFAULT_ANSWERS,
    batch_size: int = 8,
    dtype: str = "auto",
    device: str | None = None,
    as_archive: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Record:
    """Merge the models of a recipe, all fine-tunes of `base`, into the folder `output`.

    Args:
        base: a local Hugging Face folder or a hub id; the recipe's models are such, or archives.
        search: values of `scale` and `density` to try, each with each. An empty sequence stands for
            the usual values.
        search_on: what the search chooses by: tasks (`.jsonl`) and texts. By default `tasks` and
            `texts`, whose figures then flatter what was chosen by them.
        tasks, texts: files to score base, models and result on, as `evaluate` takes them; at most
            `limit` rows of each. The record keeps what the models wrote to the first `answers` rows.
        as_archive: write the result as an archive on `base` in place of a checkpoint: what
            `compress` takes, like `{"file_ratio": 32}`.
        settings: `seed`, `shard_bytes`, `dry_run`, `overwrite`, `restart`, `workers`,
            `memory_bytes`, `progress`, `record`; see `deltafold.merging.merge.merge`.

    Returns the record. Raises DeltafoldError; nothing is left under `output` then.

    >>> made = Recipe((Model("math.delta"), Model("chat/")), "ties")            # doctest: +SKIP
    >>> merge("base/", made, "merged/", search={"scale": []}, tasks=["sums.jsonl"])  # doctest: +SKIP
    """
    scoring = guide = None
    if tasks or texts:
        scoring = guide = _scoring(tasks, texts, limit, batch_size, dtype, device, answers)
    if search_on:
        rows = [path for path in search_on if str(path).endswith(".jsonl")]
        rest = [path for path in search_on if path not in rows]
        guide = _scoring(rows, rest, limit, batch_size, dtype, device)
    if guide is not None:
        _check_tokenizers(base, recipe)
    if search is not None:
        settings |= _searching(recipe, search, guide, settings.get("progress"))
    elif search_on:
        raise UsageError("--search-on is for a search; say what to try with --search.")
    if as_archive is not None:
        record = merge_to_archive(base, recipe, Path(output), dict(as_archive), settings)
    else:
        record = merge_verb(base, recipe, output, **settings)
    if scoring is not None and not settings.get("dry_run"):
        with Meter() as meter:
            scores = _scores(base, recipe, output, record, scoring, settings.get("progress"))
        record["scores"], record["score_seconds"] = scores, meter.seconds
        write_record(record, Path(settings.get("record") or record_path(Path(output))))
    return record


def _scoring(
    tasks: Sequence[str | Path],
    texts: Sequence[str | Path],
    limit: int | None,
    batch_size: int,
    dtype: str,
    device: str | None,
    answers: int = 0,
) -> Scoring:
    from deltafold.evaluation.data import read_tasks, read_texts

    wanted = choose_dtype(dtype)
    request = Request(
        tuple(map(str, tasks)),
        tuple(map(str, texts)),
        batch_size=batch_size,
        limit=limit,
        answers=answers,
    )
    read_tasks(request.tasks, limit)  # a broken file is told of before any work
    read_texts(request.texts)
    return Scoring(request, wanted, choose_device(device))


def _check_tokenizers(base: str | Path, recipe: Recipe) -> None:
    """A folder without one is told of before any work. Raises CheckpointError."""
    for source in (base, *(model.path for model in recipe.models)):
        if not is_archive(source):
            load_tokenizer(source)


# --- the search -------------------------------------------------------------------------------


def candidates_of(recipe: Recipe, search: Mapping[str, Sequence[float]]) -> list[Recipe]:
    """The recipe with each scale and each density. Raises UsageError for what cannot be searched."""
    for name in search:
        if name not in USUAL:
            raise UsageError(f"{name!r} cannot be searched; {nearest(name, list(USUAL))}")
    if "density" in search and recipe.rules[0] == "none":
        raise UsageError("A density has no effect without a sparsifier; drop it from --search.")
    values = {name: tuple(given) or USUAL[name] for name, given in search.items()}
    found = []
    for density, scale in itertools.product(
        values.get("density", (None,)), values.get("scale", (None,))
    ):
        made = recipe
        if density is not None:
            models = (replace(model, density=density) for model in made.models)
            made = replace(made, models=tuple(models))
        found.append(made if scale is None else replace(made, scale=scale))
    return found


def _searching(
    recipe: Recipe,
    search: Mapping[str, Sequence[float]],
    scoring: Scoring | None,
    progress: Progress | None,
) -> dict[str, Any]:
    """What the verb is given so that it searches."""
    if scoring is None:
        raise UsageError(
            "--search needs something to choose by; give --search-on, --task or --text."
        )
    recipes = candidates_of(recipe, search)

    guide = replace(scoring, request=replace(scoring.request, answers=0))

    def choose(formed: Formed) -> tuple[int, dict[str, Any]]:
        measure = guide.of_states(formed.files, "The candidate")
        tried: list[Metrics | None] = []
        rows = []
        for number, each in enumerate(recipes):
            named = {name: _searched(each, name) for name in search}
            if progress:
                said = ", ".join(f"{name} {value:g}" for name, value in named.items())
                progress(Step("score", said, number, len(recipes), 0))
            found = formed.known_score(number)
            if found is None:
                found = _tried(measure, formed, number)
                formed.keep_score(number, found)
            tried.append(found.get("metrics"))
            rows.append({"settings": named} | found)
        if progress:
            progress(Step("score", "", len(recipes), len(recipes), 0))
        if not any(tried):
            raise NonFiniteError(f"No candidate can be measured: {rows[0]['failed']}")
        best = best_of(tried)
        rows[best]["kept"] = True
        criterion = "share right, mean of tasks" if scoring.request.tasks else "loss"
        on = [*scoring.request.tasks, *scoring.request.texts]
        return best, {"criterion": criterion, "on": on, "tried": rows}

    return {"candidates": recipes, "choose": choose}


def _tried(measure: Any, formed: Formed, number: int) -> dict[str, Any]:
    try:
        metrics = measure(formed.state(number))
    except NonFiniteError as error:
        return {"failed": str(error)}
    return {"metrics": metrics, "share_right": share_right(metrics), "loss": mean_loss(metrics)}


def _searched(recipe: Recipe, name: str) -> float:
    return float(recipe.scale if name == "scale" else recipe.models[0].density)  # type: ignore[arg-type]


# --- scores -----------------------------------------------------------------------------------


def _scores(
    base: str | Path,
    recipe: Recipe,
    output: str | Path,
    record: Record,
    scoring: Scoring,
    progress: Progress | None,
) -> list[dict[str, Any]]:
    """Figures of base, single models and the result, on all tasks and texts."""
    sources = [("base", record["base"], base)]
    sources += [
        ("model", label, model.path)
        for label, model in zip(record["models"], recipe.models, strict=True)
    ]
    sources.append(("merged", str(output), output))
    rows = []
    for number, (role, label, source) in enumerate(sources):
        if progress:
            progress(Step("score", label, number, len(sources), 0))
        metrics = scoring.of_source(label, source, base)
        rows.append({"label": label, "role": role, "metrics": metrics})
    if progress:
        progress(Step("score", "", len(sources), len(sources), 0))
    return rows
