"""`merge` with numbers searched, models scored, and the result as an archive."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import tree_hashes
from evaluation_models import TEXT, make_llama, make_tokenizer, nudged, save, write_rows
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from deltafold import compress, evaluate, merge, restore
from deltafold.errors import CheckpointError, NonFiniteError, UsageError
from deltafold.evaluation.scoring import best_of, mean_loss, share_right
from deltafold.merging import search as search_module
from deltafold.merging.choosing import candidates_of
from deltafold.merging.recipe import Model, Recipe
from deltafold.merging.sources import CheckpointSource


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The base, and two fine-tunes."""
    root = tmp_path_factory.mktemp("search")
    made = [save(make_llama(1).bfloat16(), root / "base", make_tokenizer())]
    for seed in (2, 3):
        model = nudged(make_llama(1), seed, 0.2).bfloat16()
        made.append(save(model, root / f"tuned{seed}", make_tokenizer()))
    return made


@pytest.fixture(scope="module")
def task(folders: list[Path]) -> Path:
    """Rows whose answers are the first fine-tune's own: it is right on all of them."""
    model = AutoModelForCausalLM.from_pretrained(folders[1])
    tokenizer = make_tokenizer()
    choices = list("abcdefgh")
    rows: list[Any] = []
    for number in range(12):
        prompt = f"{number}+{number}="
        logits = model(torch.tensor([tokenizer(prompt)["input_ids"]])).logits[0, -1]
        best = logits[tokenizer.convert_tokens_to_ids(choices)].argmax()
        rows.append({"prompt": prompt, "choices": choices, "answer": int(best)})
    return write_rows(folders[0].parent / "own.jsonl", rows)


@pytest.fixture(scope="module")
def text(folders: list[Path]) -> Path:
    path = folders[0].parent / "fox.txt"
    path.write_text(TEXT)
    return path


def recipe(folders: list[Path], *names: str, **options: Any) -> Recipe:
    return Recipe(tuple(Model(str(folder)) for folder in folders[1:]), *names, **options)


def test_the_best_is_kept_and_is_what_merge_writes(
    folders: list[Path], task: Path, tmp_path: Path
) -> None:
    """On the first fine-tune's own answers scale 1 of it alone is best; the bytes are merge's."""
    one = recipe(folders[:2], "task-arithmetic")
    record = merge(one, tmp_path / "a", base=folders[0], search={"scale": [0.2, 1.0]}, tasks=[task])
    tried = record["search"]["tried"]
    assert [row["settings"] for row in tried] == [{"scale": 0.2}, {"scale": 1.0}]
    assert tried[1]["share_right"] == 1.0 > tried[0]["share_right"]
    assert tried[1]["kept"] and "kept" not in tried[0]
    merge(recipe(folders[:2], "task-arithmetic", scale=1.0), tmp_path / "b", base=folders[0])
    assert tree_hashes(tmp_path / "a") == tree_hashes(tmp_path / "b")
    assert record["recipe"]["scale"] == 1.0
    plain = json.loads((tmp_path / "b.record.json").read_text())
    assert record["tensors"] == plain["tensors"]


def test_densities_and_scales(folders: list[Path], text: Path, tmp_path: Path) -> None:
    """Each with each, on text; figures are those of `evaluate`."""
    searched = {"scale": [0.5, 1.5], "density": [0.3, 0.7]}
    made = recipe(folders, "dare-ties")
    record = merge(made, tmp_path / "a", base=folders[0], search=searched, texts=[text])
    tried = record["search"]["tried"]
    assert len(tried) == 4 and record["search"]["criterion"] == "loss"
    best = min(tried, key=lambda row: row["loss"])
    assert best["kept"]
    chosen = best["settings"]
    models = tuple(Model(str(f), density=chosen["density"]) for f in folders[1:])
    merge(Recipe(models, "dare-ties", scale=chosen["scale"]), tmp_path / "b", base=folders[0])
    assert tree_hashes(tmp_path / "a") == tree_hashes(tmp_path / "b")
    found = evaluate(folders[0], [tmp_path / "a"], texts=[text])["models"][-1]["metrics"]
    assert found["perplexity"]["value"] == pytest.approx(best["metrics"]["perplexity"]["value"])
    (merged,) = [row for row in record["scores"] if row["role"] == "merged"]
    assert merged["metrics"]["perplexity"] == best["metrics"]["perplexity"]


def test_chosen_by_other_rows(folders: list[Path], task: Path, text: Path, tmp_path: Path) -> None:
    """The search sees only what it is given; tasks are scored afterwards."""
    record = merge(
        recipe(folders), tmp_path / "a", base=folders[0],
        search={"scale": [0.5, 1.0]}, search_on=[text], tasks=[task],
    )  # fmt: skip
    assert record["search"]["on"] == [str(text)]
    assert all("tasks" not in row["metrics"] for row in record["search"]["tried"])
    assert all("perplexity" not in row["metrics"] for row in record["scores"])
    with pytest.raises(UsageError, match="say what to try with --search"):
        merge(recipe(folders), tmp_path / "b", base=folders[0], search_on=[text])


def test_models_are_read_once(
    folders: list[Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[str] = []
    true = CheckpointSource.tensor

    def counted(self: CheckpointSource, name: str) -> torch.Tensor:
        reads.append(f"{self.label} {name}")
        return true(self, name)

    monkeypatch.setattr(CheckpointSource, "tensor", counted)
    searched = {"scale": [0.2, 0.6, 1.0], "density": [0.2, 0.6]}
    merge(recipe(folders, "ties"), tmp_path / "a", base=folders[0], search=searched, texts=[text])
    tuned = [read for read in reads if not read.startswith(str(folders[0]))]
    assert len(tuned) == len(set(tuned))


def test_a_broken_search_goes_on(
    folders: list[Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments: dict[str, Any] = {"search": {"scale": [0.2, 0.6, 1.0]}, "texts": [text]}
    merge(recipe(folders), tmp_path / "whole", base=folders[0], **arguments)
    true, kept = search_module.Formed.keep_score, []

    def breaks(self: Any, number: int, score: Any) -> None:
        if number == 2 and not kept:
            kept.append(number)
            raise KeyboardInterrupt
        true(self, number, score)

    formed: list[str] = []
    true_form = search_module.Formed._form
    monkeypatch.setattr(
        search_module.Formed, "_form", lambda s, n: (formed.append(n), true_form(s, n))
    )
    monkeypatch.setattr(search_module.Formed, "keep_score", breaks)
    with pytest.raises(KeyboardInterrupt):
        merge(recipe(folders), tmp_path / "a", base=folders[0], **arguments)
    assert not (tmp_path / "a").exists()
    first = len(formed)
    merge(recipe(folders), tmp_path / "a", base=folders[0], **arguments)
    assert len(formed) == first > 0
    assert tree_hashes(tmp_path / "a") == tree_hashes(tmp_path / "whole")
    assert not (tmp_path / "a.partial").exists()


def test_scores_of_all(folders: list[Path], task: Path, text: Path, tmp_path: Path) -> None:
    """Base, each model (an archive too), and the merged one, on every task and text."""
    archive = tmp_path / "two.delta"
    compress(folders[0], folders[2], archive, "lossless")
    made = recipe([folders[0], folders[1], archive], "average")
    record = merge(made, tmp_path / "a", base=folders[0], tasks=[task], texts=[text], limit=4)
    assert [row["role"] for row in record["scores"]] == ["base", "model", "model", "merged"]
    right = [row["metrics"]["tasks"]["own"]["accuracy"]["value"] for row in record["scores"]]
    assert right[1] == 1.0 and right[0] < 1.0
    assert record["scores"][1]["metrics"]["tasks"]["own"]["accuracy"]["n"] == 4
    plain = merge(
        recipe(folders, "average"), tmp_path / "b", base=folders[0], texts=[text], limit=4
    )
    assert (
        plain["scores"][2]["metrics"]["perplexity"] == record["scores"][2]["metrics"]["perplexity"]
    )
    assert json.loads((tmp_path / "a.record.json").read_text())["scores"] == record["scores"]


def test_as_archive(folders: list[Path], text: Path, tmp_path: Path) -> None:
    """The merged delta under a budget; restored, it is near the merged checkpoint."""
    options = {"file_ratio": 3.0, "calibration": "none"}
    record = merge(
        recipe(folders), tmp_path / "m.delta", base=folders[0], as_archive=options, texts=[text]
    )
    assert record["archive"]["file_ratio"] >= 3.0 * 0.99
    assert [row["role"] for row in record["scores"]][-1] == "merged"
    restore(tmp_path / "m.delta", folders[0], tmp_path / "restored")
    merge(recipe(folders), tmp_path / "m", base=folders[0])
    base, found, wanted = (
        load_file(folder / "model.safetensors")
        for folder in (folders[0], tmp_path / "restored", tmp_path / "m")
    )
    name = "model.layers.1.mlp.up_proj.weight"
    error = (found[name].float() - wanted[name].float()).norm()
    assert error < 0.5 * (wanted[name].float() - base[name].float()).norm()
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"m", "m.delta", "m.delta.record.json", "m.record.json", "restored",
                    "restored.record.json"}  # fmt: skip


def test_scores_of_an_archive_are_in_the_record_asked_for(
    folders: list[Path], text: Path, tmp_path: Path
) -> None:
    options, where = {"file_ratio": 3.0, "calibration": "none"}, tmp_path / "mine.json"
    merge(
        recipe(folders), tmp_path / "m.delta", base=folders[0],
        as_archive=options, texts=[text], record=where,
    )  # fmt: skip
    assert len(json.loads(where.read_text())["scores"]) == 4
    assert not (tmp_path / "m.delta.record.json").exists()


def test_as_archive_goes_on_after_the_merge(
    folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A budget that cannot be met is told after the merge, which is not done again."""
    from deltafold.merging import as_archive as module

    merges: list[int] = []
    true = module.merge_models
    monkeypatch.setattr(
        module, "merge_models", lambda *a, **k: (merges.append(1), true(*a, **k))[1]
    )
    options = {"file_ratio": 5000.0, "calibration": "none"}
    with pytest.raises(UsageError, match="cannot be met"):
        merge(recipe(folders), tmp_path / "m.delta", base=folders[0], as_archive=options)
    merge(
        recipe(folders),
        tmp_path / "m.delta",
        base=folders[0],
        as_archive=options | {"file_ratio": 3},
    )
    assert merges == [1]
    assert not (tmp_path / "m.delta.merging").exists()


def test_what_is_best_by_hand() -> None:
    def of(right: float, loss: float) -> dict[str, Any]:
        return {"tasks": {"a": {"exact_match": {"value": right}, "answer_loss": {"value": loss}}}}

    assert best_of([of(0.5, 1.0), of(0.6, 9.0), None]) == 1
    assert best_of([of(0.5, 1.0), of(0.5, 0.9)]) == 1
    assert share_right(of(0.5, 1.0)) == 0.5 and share_right({}) is None
    assert mean_loss({"perplexity": {"value": 1.0}}) == 0.0


def test_candidates() -> None:
    made = Recipe((Model("a"), Model("b", 0.3)), "ties")
    found = candidates_of(made, {"scale": [0.5], "density": []})
    assert [each.models[1].density for each in found] == [0.2, 0.4, 0.6, 0.8]
    assert {each.scale for each in found} == {0.5} and found[0].models[1].weight == 0.3
    with pytest.raises(UsageError, match="'scales' cannot be searched; did you mean 'scale'"):
        candidates_of(made, {"scales": []})
    with pytest.raises(UsageError, match="no effect without a sparsifier"):
        candidates_of(Recipe((Model("a"),), "average"), {"density": []})


def test_what_cannot_be(folders: list[Path], text: Path, tmp_path: Path, deltafold: Any) -> None:
    with pytest.raises(UsageError, match="needs something to choose by"):
        merge(recipe(folders), tmp_path / "a", base=folders[0], search={"scale": []})
    with pytest.raises(NonFiniteError, match="No candidate can be measured"):
        merge(
            recipe(folders), tmp_path / "a", base=folders[0], search={"scale": [1e39]}, texts=[text]
        )
    for arguments, words in (
        (["--file-ratio", 8], "add --as-archive"),
        (["--search", "scale=a"], "is not like scale=0.4,0.8,1"),
        (["--task", tmp_path / "none.jsonl"], "none.jsonl"),
        (["--text", text, "--dtype", "fp8"], "There is no dtype 'fp8'"),
        (["--as-archive", "--archive-method", "lossles"], "lossless"),
        (["--as-archive", "--archive-method", "lossless", "--bytes", "8MB"], "drop the budget"),
    ):
        done = deltafold("merge", *folders, "-o", tmp_path / "a", *arguments)
        assert done.returncode != 0 and words in done.stderr, (arguments, done.stderr)
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_a_tokenizer_is_told_of_first(
    folders: list[Path], text: Path, tmp_path: Path
) -> None:
    bare = save(make_llama(4).bfloat16(), tmp_path / "bare")
    with pytest.raises(CheckpointError, match="bare holds no tokenizer"):
        merge(recipe([folders[0], bare]), tmp_path / "a", base=folders[0], texts=[text])
    assert not (tmp_path / "a").exists() and not (tmp_path / "a.partial").exists()


def test_the_command(folders: list[Path], task: Path, tmp_path: Path, deltafold: Any) -> None:
    done = deltafold(
        "merge", *folders, "-o", tmp_path / "m.delta", "-m", "task-arithmetic", "--task", task,
        "--search", "scale=0.5,1", "--as-archive", "--bytes", "40kB", "--calibration", "none",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for words in ("in the merged", "Tried", "kept", "archive: ", "own", "base"):
        assert words in done.stdout
    assert (tmp_path / "m.delta/delta.json").is_file()
