"""The tokenizers of models to merge: what their rows mean, and the files of the merged one.

`tokenizer.json` is read, the format of the `tokenizers` library. A folder that has only the files
of older kinds is as good as one without: its rows are known by number.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from typing import Any

from deltafold.checkpoint.contents import is_index
from deltafold.checkpoint.json_files import parse_object
from deltafold.errors import CheckpointError
from deltafold.merging.vocabulary import Settled, Vocabulary

TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt",
    "merges.txt", "*.model", "chat_template*", "additional_chat_templates/*", "tekken.json",
    "*.tiktoken", "*.spm", "bpe.codes", "vocab.bpe", "*.vocab",
)  # fmt: skip
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
NOT_ADOPTED = ("config.json", "generation_config.json", "README.md")
Files = dict[str, bytes]


def vocabulary_of(label: str, rows: int, files: Mapping[str, bytes]) -> Vocabulary:
    """The vocabulary of a model with so many rows. Raises CheckpointError for a broken file."""
    if "tokenizer.json" not in files:
        return Vocabulary(label, rows, known=False)
    found = parse_object(files["tokenizer.json"], f"tokenizer.json of {label}")
    try:
        proper = found["model"]["vocab"]
        if isinstance(proper, dict):
            tokens = {int(row): str(text) for text, row in proper.items()}
        else:  # Unigram: [[text, score], ...]
            tokens = {row: str(entry[0]) for row, entry in enumerate(proper)}
        added = {int(each["id"]): str(each["content"]) for each in found.get("added_tokens") or []}
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise CheckpointError(
            f"tokenizer.json of {label} is not one of the tokenizers library ({error!r}); put a "
            "proper one in its place."
        ) from None
    return Vocabulary(label, rows, tokens | added, frozenset(added.values()))


def merged_files(
    base: Mapping[str, bytes],
    models: Sequence[Mapping[str, bytes]],
    settled: Settled,
    owner: int | None,
) -> Files:
    """Config, tokenizer and the like of the merged model. `owner`: whose tokenizer, None the base's."""
    files = dict(base)
    if owner is not None:
        files = {name: data for name, data in files.items() if not is_tokenizer_file(name)}
        theirs = models[owner]
        files |= {name: data for name, data in theirs.items() if is_tokenizer_file(name)}
        if "generation_config.json" in theirs:
            files["generation_config.json"] = theirs["generation_config.json"]
    elif settled.new:
        _add_tokens(files, models, settled)
    if "config.json" in files:
        files["config.json"] = _config(files["config.json"], models, settled, owner)
    return files


def is_tokenizer_file(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in TOKENIZER_FILES)


def adopted_files(
    base: Mapping[str, bytes], models: Sequence[tuple[str, Mapping[str, bytes]]]
) -> tuple[Files, list[str]]:
    """Files that the base lacks and models have: modules, processors, code; and notes on the rest.

    A file that models have with different content comes from the first of them. Tokenizer, card and
    generation settings are the base's, or of the model whose tokenizer is asked for.
    """
    files: Files = {}
    left: dict[str, list[str]] = {}
    owners: dict[str, str] = {}
    notes = []
    for label, theirs in models:
        for name, data in sorted(theirs.items()):
            if name in base:
                continue
            if is_tokenizer_file(name) or name in NOT_ADOPTED or is_index(name):
                left.setdefault(label, []).append(name)
            elif name not in files:
                files[name], owners[name] = data, label
            elif files[name] != data:
                notes.append(f"{name} differs between models: that of {owners[name]} is taken.")
    for label, names in left.items():
        named = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        notes.append(f"not taken from {label}: {named}; the base's tokenizer files are kept.")
    return files, notes


def _config(
    data: bytes, models: Sequence[Mapping[str, bytes]], settled: Settled, owner: int | None
) -> bytes:
    """The base's config with the rows of the merged vocabulary; unchanged bytes where they agree."""
    config = parse_object(data, "config.json of the base")
    inner = config["text_config"] if "vocab_size" in config.get("text_config", {}) else config
    # A table may have more rows than the head, for images; where nothing changes the config is right.
    wanted: dict[str, Any] = {} if settled.is_plain else {"vocab_size": settled.rows}
    if owner is not None and "config.json" in models[owner]:
        theirs = parse_object(models[owner]["config.json"], "config.json of the tokenizer's owner")
        wanted |= {key: theirs[key] for key in SPECIAL_IDS if key in theirs}
    if all(inner.get(key) == value for key, value in wanted.items()):
        return data
    inner.update(wanted)
    return _dumped(config)


def untied(data: bytes) -> bytes:
    """A config that says that head and embedding are two."""
    config = parse_object(data, "config.json of the base")
    config["tie_word_embeddings"] = False
    if "tie_word_embeddings" in config.get("text_config", {}):
        config["text_config"]["tie_word_embeddings"] = False
    return _dumped(config)


def _add_tokens(files: Files, models: Sequence[Mapping[str, bytes]], settled: Settled) -> None:
    """Put the new tokens into the base's tokenizer files, under their new numbers."""
    tokenizer = parse_object(files["tokenizer.json"], "tokenizer.json of the base")
    settings = parse_object(
        files.get("tokenizer_config.json", b"{}"), "tokenizer_config.json of the base"
    )
    plain = None
    if "added_tokens.json" in files:
        plain = parse_object(files["added_tokens.json"], "added_tokens.json of the base")
    tokenizer.setdefault("added_tokens", [])
    for text, number, row, place in settled.new:
        entries = parse_object(models[number]["tokenizer.json"], "tokenizer.json")["added_tokens"]
        entry = next(each for each in entries if each["id"] == row and each["content"] == text)
        tokenizer["added_tokens"].append(entry | {"id": place})
        if "added_tokens_decoder" in settings:
            shown = {key: value for key, value in entry.items() if key != "id"}
            settings["added_tokens_decoder"][str(place)] = shown
        if plain is not None:
            plain[text] = place
    files["tokenizer.json"] = _dumped(tokenizer)
    if "added_tokens_decoder" in settings:
        files["tokenizer_config.json"] = _dumped(settings)
    if plain is not None:
        files["added_tokens.json"] = _dumped(plain)


def _dumped(value: object) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
