"""`merge` with what is measured: numbers searched, scores of all models, the result as an archive."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from deltafold.archive import Archive, is_archive
from deltafold.errors import NonFiniteError, UsageError, nearest
from deltafold.evaluation.loading import choose_device, choose_dtype, load_tokenizer
from deltafold.evaluation.request import Measuring
from deltafold.evaluation.scoring import Metrics, Scoring, best_of, mean_loss, share_right
from deltafold.merging.as_archive import merge_to_archive
from deltafold.merging.merge import Wish, merge_models
from deltafold.merging.recipe import Model, Recipe
from deltafold.merging.recipe_files import read_recipe
from deltafold.merging.request import MergeRequest, parse_value
from deltafold.merging.search import Formed
from deltafold.restoring.named import names_of
from deltafold.running.engine import Progress, Step
from deltafold.running.front import front
from deltafold.running.memory import Meter
from deltafold.running.record import Record, record_path, write_afterwards

# The papers' values: Yadav et al. 2023 and Yang et al. 2025 (ImPart, table 8).
USUAL: dict[str, tuple[float, ...]] = {
    "scale": (0.4, 0.6, 0.8, 1.0, 1.2),
    "density": (0.2, 0.4, 0.6, 0.8),
}


def run_merge(request: MergeRequest) -> Record:
    """Merge; search numbers, score models, make an archive, as the request says."""
    base, recipe = recipe_of(request)
    scoring = guide = _scoring(request, request.tasks, request.texts, request.answers)
    if request.search_on:
        rows = [path for path in request.search_on if str(path).endswith(".jsonl")]
        rest = [path for path in request.search_on if path not in rows]
        guide = _scoring(request, rows, rest)
    if guide is not None:
        _check_tokenizers(base, recipe)
    wish = Wish(base, recipe)
    if request.search is not None:
        wish = _searching(wish, request, guide)
    elif request.search_on:
        raise UsageError("--search-on is for a search; say what to try with --search.")
    record = (merge_to_archive if request.as_archive else merge_models)(request, wish)
    if scoring is not None and not request.dry_run:
        output = Path(request.output)
        with Meter() as meter:
            scores = _scores(wish, output, record, scoring, request.progress)
        record["scores"], record["score_seconds"] = scores, meter.seconds
        write_afterwards(record, Path(request.record or record_path(output)), output)
    return record


merge = front("merge", MergeRequest, run_merge)


def recipe_of(request: MergeRequest) -> tuple[str, Recipe]:
    """(base, recipe) of a file, of a `Recipe`, or of models and numbers. Raises UsageError."""
    base, models = request.base, request.models
    if request.config is not None:
        if base is not None or models:
            raise UsageError("--config names base and models; drop them from the command line.")
        found, recipe = read_recipe(Path(request.config))
        tokenizer = request.tokenizer
        return found, replace(recipe, tokenizer=tokenizer) if tokenizer else recipe
    if isinstance(models, str | Path):
        raise UsageError(f"{models} is one model; give a list of fine-tunes to merge.")
    if not models:
        raise UsageError("Name the base and at least one fine-tune, or give --config.")
    recipe = models if isinstance(models, Recipe) else _recipe(request)
    return str(base or base_named_by(recipe)), recipe


def _recipe(request: MergeRequest) -> Recipe:
    given = list(request.models)
    weights = _each("--weight", request.weight, len(given), 1.0)
    densities = _each("--density", request.density, len(given), None)
    models = [
        each if isinstance(each, Model) else Model(str(each), weight, density)
        for each, weight, density in zip(given, weights, densities, strict=True)
    ]
    return Recipe(
        tuple(models), request.method, request.sparsify, request.consensus, request.scale,
        dict(request.method_settings), request.tokenizer,
    )  # fmt: skip


def _each(option: str, given: Sequence[Any] | None, count: int, usual: Any) -> list[Any]:
    """One value a model. Raises UsageError for any other number of values."""
    if not given:
        return [usual] * count
    values = [parse_value(each, option) if isinstance(each, str) else each for each in given]
    if len(values) not in (1, count):
        raise UsageError(
            f"{option} is given {len(values)} times for {count} models; give one for all or one each."
        )
    return values * count if len(values) == 1 else values


def base_named_by(recipe: Recipe) -> str:
    """The base in the record of an archive among the models, beside it or by its id.

    Raises UsageError where none does.
    """
    for model in recipe.models:
        if is_archive(model.path):
            with Archive(Path(model.path)) as archive:
                label, _ = names_of(archive)
            if label:
                beside = Path(model.path).absolute().parent / label
                return str(beside) if beside.is_dir() else label
    raise UsageError(
        "No archive with a record is among the models that would name the base; give it."
    )


def _scoring(
    request: MergeRequest,
    tasks: Sequence[str | Path],
    texts: Sequence[str | Path],
    answers: int = 0,
) -> Scoring | None:
    if not tasks and not texts:
        return None
    from deltafold.evaluation.data import read_tasks, read_texts

    asked = Measuring(
        tasks=tasks,
        texts=texts,
        batch_size=request.batch_size,
        limit=request.limit,
        answers=answers,
    )
    read_tasks(asked.tasks, request.limit)  # a broken file is reported before any work
    read_texts(asked.texts)
    return Scoring(asked, choose_dtype(request.dtype), choose_device(request.device))


def _check_tokenizers(base: str | Path, recipe: Recipe) -> None:
    """A folder without one is reported before any work. Raises CheckpointError."""
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


def _searching(wish: Wish, request: MergeRequest, scoring: Scoring | None) -> Wish:
    """The wish with candidates, and what chooses among them."""
    if scoring is None:
        raise UsageError(
            "--search needs something to choose by; give --search-on, --task or --text."
        )
    search, progress = request.search, request.progress
    assert isinstance(search, Mapping)
    recipes = candidates_of(wish.recipe, search)

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

    return replace(wish, candidates=recipes, choose=choose)


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
    wish: Wish, output: Path, record: Record, scoring: Scoring, progress: Progress | None
) -> list[dict[str, Any]]:
    """Figures of base, single models and the result, on all tasks and texts."""
    base = wish.base
    sources: list[tuple[str, str, str | Path]] = [("base", record["base"], base)]
    sources += [
        ("model", label, model.path)
        for label, model in zip(record["models"], wish.recipe.models, strict=True)
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
