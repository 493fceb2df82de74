"""Merging where vocabularies, tokenizers and heads differ: settled by name, or refused before work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import tree_hashes
from evaluation_models import VOCABULARY, make_llama, make_tokenizer, nudged, save
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from deltafold import merge
from deltafold.errors import CheckpointError, MismatchError, UsageError
from deltafold.merging.recipe import Model, Recipe
from deltafold.merging.recipe_files import read_recipe
from deltafold.merging.vocabulary import Vocabulary, settle

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def state(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def tuned(
    folder: Path, seed: int, *added: str, rows: int | None = None, tied: bool = False
) -> Path:
    """A fine-tune of `base` with tokens of its own at the end of its vocabulary."""
    model = make_llama(1)
    if added:
        model.resize_token_embeddings(rows or VOCABULARY + len(added), mean_resizing=False)
    model = nudged(model, seed, 0.2)
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(list(added), special_tokens=True)
    return save(model.bfloat16(), folder, tokenizer)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vocabulary") / "base"
    return save(make_llama(1).bfloat16(), folder, make_tokenizer())


@pytest.fixture(scope="module")
def chat(base: Path) -> Path:
    return tuned(base.parent / "chat", 2, "<user>", "<bot>")


@pytest.fixture(scope="module")
def tools(base: Path) -> Path:
    """Its `<bot>` stands where chat has `<user>`."""
    return tuned(base.parent / "tools", 3, "<bot>", "<tool>")


def recipe(*folders: Path, tokenizer: str | None = None, **options: Any) -> Recipe:
    models = tuple(Model(str(folder)) for folder in folders)
    return Recipe(models, options.pop("method", "task-arithmetic"), tokenizer=tokenizer, **options)


def test_the_bases_by_default(base: Path, chat: Path, tmp_path: Path) -> None:
    """Tokens that the base lacks are left out, and the record says so by name."""
    record = merge(recipe(chat), tmp_path / "out", base=base)
    found, theirs = state(tmp_path / "out"), state(chat)
    assert found[EMBEDDING].shape[0] == VOCABULARY == record["vocabulary"]["rows"]
    for name in found:
        wanted = theirs[name][:VOCABULARY] if name in (EMBEDDING, HEAD) else theirs[name]
        assert torch.allclose(found[name].float(), wanted.float(), rtol=2**-7, atol=1e-6)
    (note,) = record["notes"]
    assert "2 tokens (<user>, <bot>) of" in note and "--tokenizer union" in note
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_models(base: Path, chat: Path, tools: Path, tmp_path: Path) -> None:
    merge(recipe(chat, tools, tokenizer=str(chat)), tmp_path / "out", base=base)
    found = state(tmp_path / "out")
    one, two = state(chat)[HEAD].float(), state(tools)[HEAD].float()
    assert len(found[HEAD]) == VOCABULARY + 2
    assert torch.equal(found[HEAD][VOCABULARY], state(chat)[HEAD][VOCABULARY])  # <user>: only here
    both = (one[VOCABULARY + 1] + two[VOCABULARY]) / 2  # <bot>, the mean, not the sum of deltas
    assert torch.allclose(found[HEAD][VOCABULARY + 1].float(), both, rtol=2**-7)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.convert_tokens_to_ids(["<user>", "<bot>"]) == [VOCABULARY, VOCABULARY + 1]
    assert json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == VOCABULARY + 2


def test_a_union(base: Path, chat: Path, tools: Path, tmp_path: Path) -> None:
    record = merge(recipe(chat, tools, tokenizer="union"), tmp_path / "out", base=base)
    found, one, two = (
        state(folder)[EMBEDDING].float() for folder in (tmp_path / "out", chat, tools)
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer.convert_tokens_to_ids(["<user>", "<bot>", "<tool>"])
    assert ids == [VOCABULARY, VOCABULARY + 1, VOCABULARY + 2]
    assert torch.equal(found[ids[0]], one[VOCABULARY]) and torch.equal(
        found[ids[2]], two[VOCABULARY + 1]
    )
    both = (one[VOCABULARY + 1] + two[VOCABULARY]) / 2
    assert torch.allclose(found[ids[1]], both, rtol=2**-7)
    ground = state(base)[EMBEDDING].float()
    known = ground + (one[:VOCABULARY] - ground) + (two[:VOCABULARY] - ground)
    assert torch.allclose(found[:VOCABULARY], known, rtol=2**-7, atol=1e-5)
    assert tokenizer("<user>12<tool>")["input_ids"][0] == ids[0]
    assert record["notes"] == [
        f"3 tokens (<user>, <bot>, <tool>) not in {base}: the mean of the models that have them."
    ]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model(torch.tensor([ids])).logits.shape[-1] == VOCABULARY + 3


@pytest.mark.parametrize("method", ["ties", "dare-ties", "slerp", "impart"])
def test_new_rows_by_every_way(
    method: str, base: Path, chat: Path, tools: Path, tmp_path: Path
) -> None:
    merge(recipe(chat, tools, tokenizer="union", method=method), tmp_path / "out", base=base)
    found = state(tmp_path / "out")[EMBEDDING]
    assert torch.equal(found[VOCABULARY], state(chat)[EMBEDDING][VOCABULARY])
    assert found.isfinite().all()


def test_weights_of_new_rows(base: Path, chat: Path, tools: Path, tmp_path: Path) -> None:
    models = (Model(str(chat), 3.0), Model(str(tools), 1.0))
    merge(Recipe(models, "task-arithmetic", tokenizer="union"), tmp_path / "out", base=base)
    one, two = (state(folder)[EMBEDDING].float() for folder in (chat, tools))
    wanted = 0.75 * one[VOCABULARY + 1] + 0.25 * two[VOCABULARY]
    assert torch.allclose(
        state(tmp_path / "out")[EMBEDDING][VOCABULARY + 1].float(), wanted, rtol=2**-7
    )


def test_padding_is_no_token(base: Path, tmp_path: Path) -> None:
    """Rows that no tokenizer names go by their number, and a union fills the first of them."""
    padded = tuned(tmp_path / "padded", 4, "<user>", rows=64)
    record = merge(recipe(padded), tmp_path / "out", base=base)
    assert "1 token (<user>) of" in record["notes"][0]
    merge(recipe(padded, tokenizer=str(padded)), tmp_path / "theirs", base=base)
    assert torch.equal(state(tmp_path / "theirs")[HEAD][-1], state(padded)[HEAD][-1])
    merge(recipe(padded, tokenizer="union"), tmp_path / "union", base=base)
    assert len(state(tmp_path / "union")[HEAD]) == VOCABULARY + 1


def test_one_vocabulary_is_the_plain_way(base: Path, tmp_path: Path) -> None:
    """Naming the tokenizer of a model that has the base's changes no weight."""
    plain = tuned(tmp_path / "plain", 5)
    merge(recipe(plain), tmp_path / "one", base=base)
    record = merge(recipe(plain, tokenizer=str(plain)), tmp_path / "two", base=base)
    assert tree_hashes(tmp_path / "one") == tree_hashes(tmp_path / "two")
    assert record["notes"] == []


def test_tokenizers_that_cannot_be(base: Path, chat: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match="There is no tokenizer 'onion' to take; did you mean 'union'"
    ):
        merge(recipe(chat, tokenizer="onion"), tmp_path / "out", base=base)
    other = tuned(tmp_path / "other", 6)
    vocabulary = {f"w{n}": n for n in range(VOCABULARY)}
    (other / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
    with pytest.raises(MismatchError, match="share 0 of 46 tokens; they are not fine-tunes"):
        merge(recipe(other), tmp_path / "out", base=base)
    bare = save(make_llama(1, vocabulary=VOCABULARY + 3).bfloat16(), tmp_path / "bare")
    with pytest.raises(
        MismatchError,
        match=r"bare has no tokenizer\.json, so it is not known what the 3 extra rows",
    ):
        merge(recipe(bare, tokenizer="union"), tmp_path / "out", base=base)
    (other / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json of .* is not valid JSON"):
        merge(recipe(other), tmp_path / "out", base=base)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare", "other"]


def test_a_word_of_another_vocabulary() -> None:
    base = Vocabulary("base", 2, {0: "a", 1: "b"})
    model = Vocabulary("other", 3, {0: "a", 1: "b", 2: "c"})
    with pytest.raises(MismatchError, match="'c' of other belongs to another vocabulary"):
        settle(base, [model], "union")


@given(st.data())
def test_every_row_is_the_row_of_its_token(data: st.DataObject) -> None:
    """Whatever is asked for, and wherever tokens stand."""
    words = [f"w{n}" for n in range(6)]

    def draw(label: str, least: int) -> Vocabulary:
        picked = data.draw(st.permutations(words))[: data.draw(st.integers(least, 6))]
        rows = data.draw(st.integers(len(picked), 8))
        return Vocabulary(label, rows, dict(enumerate(picked)), frozenset(words))

    base, models = draw("x", 1), [draw("y", 0), draw("z", 0)]
    for choice in (None, "union", "z"):
        found = settle(base, models, choice)
        assert len(found.base_rows) == found.rows
        names = {None: base.names(), "z": models[1].names()}.get(choice)
        for row in range(found.rows):
            sources = zip((base, *models), (found.base_rows, *found.model_rows), strict=True)
            here = {each.names()[rows[row]] for each, rows in sources if rows[row] >= 0}
            assert len(here) == 1 and (names is None or here == {names[row]})
        if choice == "union":
            wanted = {name for each in (base, *models) for name in each.tokens.values()}
            held = {each.tokens.get(rows[row]) for row in range(found.rows)
                    for each, rows in zip((base, *models), (found.base_rows, *found.model_rows), strict=True)
                    if rows[row] >= 0}  # fmt: skip
            assert wanted == held - {None}


def test_a_head_of_its_own(base: Path, tmp_path: Path) -> None:
    """Base untied, one model tied: its embedding is its head."""
    tied = tuned(tmp_path / "tied", 7, tied=True)
    assert HEAD not in state(tied)
    record = merge(recipe(tied), tmp_path / "out", base=base)
    found, theirs = state(tmp_path / "out"), state(tied)
    assert torch.allclose(found[HEAD].float(), theirs[EMBEDDING].float(), rtol=2**-7, atol=1e-6)
    assert "lm_head.weight is a tensor of its own in" in record["notes"][0]


def test_a_tied_base_is_parted(base: Path, tmp_path: Path) -> None:
    """Base tied, one model untied: the merged one has two, and says so in its config."""
    tied = tuned(tmp_path / "tied", 7, tied=True)
    untied = tuned(tmp_path / "untied", 8)
    merge(recipe(untied), tmp_path / "out", base=tied)
    found, theirs = state(tmp_path / "out"), state(untied)
    for name in (HEAD, EMBEDDING):
        assert torch.allclose(found[name].float(), theirs[name].float(), rtol=2**-6, atol=1e-5)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert not model.config.tie_word_embeddings


def test_a_stored_head_that_is_not_used(base: Path, tmp_path: Path) -> None:
    """A tied model that stores its head all the same is tied."""
    tied, twice = tuned(tmp_path / "tied", 7, tied=True), tuned(tmp_path / "twice", 8, tied=True)
    tensors = state(twice)
    save_file(
        tensors | {HEAD: tensors[EMBEDDING].clone()}, twice / "model.safetensors", {"format": "pt"}
    )
    record = merge(recipe(twice), tmp_path / "out", base=tied)
    assert HEAD not in state(tmp_path / "out") and record["notes"] == []


def test_other_dtypes(base: Path, tmp_path: Path) -> None:
    """The base's dtype is the result's, whatever the models are stored in."""
    model = nudged(make_llama(1), 9, 0.2)
    save(model.float(), tmp_path / "wide", make_tokenizer())
    merge(recipe(tmp_path / "wide"), tmp_path / "out", base=base)
    found, theirs = state(tmp_path / "out"), state(tmp_path / "wide")
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert torch.allclose(found[HEAD].float(), theirs[HEAD], rtol=2**-7, atol=1e-6)


def test_a_dry_run(base: Path, chat: Path, tmp_path: Path, deltafold: Any) -> None:
    done = deltafold("merge", base, chat, "-o", tmp_path / "out", "--dry-run")
    assert done.returncode == 0 and "2 tokens (<user>, <bot>)" in done.stdout
    assert "nothing was written" in done.stdout and list(tmp_path.iterdir()) == []


def test_mergekits_words(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    head = "merge_method: ties\nbase_model: a\nmodels: [{model: b}]\n"
    for text, wanted in (
        ("tokenizer_source: union", "union"),
        ("tokenizer: {source: base}", "base"),
        ('tokenizer_source: "model:b"', "b"),
    ):
        path.write_text(head + text)
        assert read_recipe(path)[1].tokenizer == wanted


def test_the_vocabulary_is_the_longest_table(tmp_path: Path) -> None:
    """BERT's table of token types comes first in the file, and has two rows, as its head may.

    A config that counts fewer rows than the table, as Mllama's does, stays as it is.
    """
    shapes = {
        "bert.embeddings.token_type_embeddings.weight": (2, 8),
        "bert.embeddings.word_embeddings.weight": (20, 8),
        "bert.encoder.layers.0.relative_pos_embeddings.weight": (40, 8),
        "classifier.bias": (2,),
        "classifier.weight": (2, 8),
    }
    for n, name in enumerate(("base", "one", "two")):
        torch.manual_seed(n)
        (tmp_path / name).mkdir()
        tensors = {key: torch.randn(shape) for key, shape in shapes.items()}
        save_file(tensors, tmp_path / name / "model.safetensors", {"format": "pt"})
        (tmp_path / name / "config.json").write_text('{"vocab_size": 16}')
        make_tokenizer().save_pretrained(tmp_path / name)
    merge([tmp_path / "one", tmp_path / "two"], tmp_path / "out", "average", base=tmp_path / "base")
    assert json.loads((tmp_path / "out/config.json").read_text()) == {"vocab_size": 16}
    found = state(tmp_path / "out")
    assert {key: tuple(each.shape) for key, each in found.items()} == shapes
    one, two = state(tmp_path / "one"), state(tmp_path / "two")
    assert all(torch.allclose(found[n], (one[n] + two[n]) / 2, atol=1e-6) for n in shapes)
