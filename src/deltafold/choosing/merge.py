"""`merge` with what is measured: numbers searched, scores of all models, the result as an archive."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from deltafold.choosing.scores import Metrics, Scoring, best_of, mean_loss, share_right
from deltafold.engine import Progress, Step
from deltafold.errors import NonFiniteError, UsageError, nearest
from deltafold.evaluation.loading import DTYPES, choose_device
from deltafold.evaluation.plan import Request
from deltafold.merging.recipe import Model, Recipe
from deltafold.record import Record, check_record_path, record_path, write_record
from deltafold.verbs.compress import compress
from deltafold.verbs.job import budget_of
from deltafold.verbs.merge import merge as merge_verb
from deltafold.verbs.merge_search import Formed
from deltafold.verbs.workspace import check_output

# The papers' values: Yadav et al. 2023 and Yang et al. 2025 (ImPart, table 8).
USUAL: dict[str, tuple[float, ...]] = {
    "scale": (0.4, 0.6, 0.8, 1.0, 1.2),
    "density": (0.2, 0.4, 0.6, 0.8),
}
QUIET = ("progress", "workers", "memory_bytes")


def merge(
    base: str | Path,
    recipe: Recipe,
    output: str | Path,
    *,
    search: Mapping[str, Sequence[float]] | None = None,
    tasks: Sequence[str | Path] = (),
    texts: Sequence[str | Path] = (),
    limit: int | None = None,
    batch_size: int = 8,
    dtype: str = "auto",
    device: str | None = None,
    as_archive: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Record:
    """Merge the models of a recipe, all fine-tunes of `base`, into the folder `output`.

    Args:
        base: a local Hugging Face folder or a hub id; the recipe's models are such, or archives.
        search: values of `scale` and `density` to try, each with each; what does best on `tasks`
            and `texts` is kept. An empty sequence stands for the usual values.
        tasks, texts: files to score base, models and result on, as `evaluate` takes them; at most
            `limit` rows of each.
        as_archive: write the result as an archive on `base` in place of a checkpoint: what
            `compress` takes, like `{"file_ratio": 32}`.
        settings: `seed`, `shard_bytes`, `dry_run`, `overwrite`, `restart`, `workers`,
            `memory_bytes`, `progress`, `record`; see `deltafold.verbs.merge.merge`.

    Returns the record. Raises DeltafoldError; nothing is left under `output` then.

    >>> made = Recipe((Model("math.delta"), Model("chat/")), "ties")            # doctest: +SKIP
    >>> merge("base/", made, "merged/", search={"scale": []}, tasks=["sums.jsonl"])  # doctest: +SKIP
    """
    scoring = None
    if tasks or texts:
        scoring = _scoring(tasks, texts, limit, batch_size, dtype, device)
    if search is not None:
        settings |= _searching(recipe, search, scoring, settings.get("progress"))
    if as_archive is not None:
        budget_of(as_archive.get("method", "auto"), *map(as_archive.get, BUDGETS))
        record = _to_archive(base, recipe, Path(output), dict(as_archive), settings)
    else:
        record = merge_verb(base, recipe, output, **settings)
    if scoring is not None and not settings.get("dry_run"):
        record["scores"] = _scores(base, recipe, output, record, scoring, settings.get("progress"))
        write_record(record, Path(settings.get("record") or record_path(Path(output))))
    return record


BUDGETS = ("file_ratio", "nominal_ratio", "n_bytes")


def _scoring(
    tasks: Sequence[str | Path],
    texts: Sequence[str | Path],
    limit: int | None,
    batch_size: int,
    dtype: str,
    device: str | None,
) -> Scoring:
    from deltafold.evaluation.data import read_tasks, read_texts

    if dtype != "auto" and dtype not in DTYPES:
        raise UsageError(f"There is no dtype {dtype!r}; {nearest(dtype, ['auto', *DTYPES])}")
    request = Request(
        tuple(map(str, tasks)), tuple(map(str, texts)), batch_size=batch_size, limit=limit
    )
    read_tasks(request.tasks, limit)  # a broken file is told of before any work
    read_texts(request.texts)
    return Scoring(request, dtype, choose_device(device))


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
            made = replace(made, models=tuple(_with(model, density) for model in made.models))
        found.append(made if scale is None else replace(made, scale=scale))
    return found


def _with(model: Model, density: float) -> Model:
    return replace(model, density=density)


def _searching(
    recipe: Recipe,
    search: Mapping[str, Sequence[float]],
    scoring: Scoring | None,
    progress: Progress | None,
) -> dict[str, Any]:
    """What the verb is given so that it searches."""
    if scoring is None:
        raise UsageError("--search needs something to choose by; give --task or --text.")
    recipes = candidates_of(recipe, search)

    def choose(formed: Formed) -> tuple[int, dict[str, Any]]:
        measure = scoring.of_states(formed.files, "The candidate")
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
        return best, {"criterion": criterion, "tried": rows}

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


# --- the result as an archive -----------------------------------------------------------------


def _to_archive(
    base: str | Path,
    recipe: Recipe,
    output: Path,
    options: dict[str, Any],
    settings: dict[str, Any],
) -> Record:
    """Merge into a folder beside the output, compress it, and drop it."""
    overwrite, record = settings.pop("overwrite", False), settings.pop("record", None)
    check_output(output, overwrite, [base, *(model.path for model in recipe.models)])
    check_record_path(record)
    if settings.get("dry_run"):
        return merge_verb(base, recipe, output, overwrite=overwrite, **settings)
    folder = output.with_name(f"{output.name}.merged")
    made = _merged_before(base, recipe, folder, settings)
    if made is None:
        for path in (folder, record_path(folder)):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        made = merge_verb(base, recipe, folder, **settings)
        made["asked"] = _asked(base, recipe, settings)
        write_record(made, record_path(folder))
    quiet = {name: settings[name] for name in QUIET if name in settings}
    restart = settings.get("restart", False)
    archived = compress(
        base, folder, output, overwrite=overwrite, restart=restart, **options, **quiet
    )
    made.pop("asked")
    made |= {
        "output": str(output),
        "archive": archived["totals"] | {"settings": archived["settings"]},
    }
    made["seconds"] += archived["seconds"]
    made["peak_memory_bytes"] = max(made["peak_memory_bytes"], archived["peak_memory_bytes"])
    write_record(made, Path(record) if record else record_path(output))
    shutil.rmtree(folder)
    record_path(folder).unlink()
    return made


def _asked(base: str | Path, recipe: Recipe, settings: dict[str, Any]) -> dict[str, Any]:
    """What a merged folder is bound to."""
    candidates = [each.to_json() for each in settings.get("candidates", ())]
    inputs = [_identity(Path(each)) for each in (base, *(model.path for model in recipe.models))]
    asked = {"recipe": recipe.to_json(), "candidates": candidates, "inputs": inputs,
             "seed": settings.get("seed", 0)}  # fmt: skip
    return dict(json.loads(json.dumps(asked)))


def _identity(path: Path) -> list[Any]:
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return [
        [str(file), file.stat().st_size, file.stat().st_mtime_ns]
        for file in files
        if file.is_file()
    ]


def _merged_before(
    base: str | Path, recipe: Recipe, folder: Path, settings: dict[str, Any]
) -> Record | None:
    """The record of a merge that an earlier run finished, if it is of the same inputs."""
    path = record_path(folder)
    if settings.get("restart") or not (folder.is_dir() and path.is_file()):
        return None
    found = json.loads(path.read_text())
    return found if found.get("asked") == _asked(base, recipe, settings) else None
