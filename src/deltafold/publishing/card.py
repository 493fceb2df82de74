"""The model card of what is pushed: front matter that the hub reads, and what the record says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from deltafold.checkpoint import is_hub_id
from deltafold.reporting.tables import tables_of
from deltafold.running.record import Record

_FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*(?:\n|\Z)", re.S)


def card(repo: str, archive: bool, base: str, record: Record | None, license_id: str | None) -> str:
    """The card as Markdown.

    Args:
        repo: where it will lie, `owner/name`.
        archive: an archive, in place of an ordinary checkpoint.
        base: the base as the run named it; it is linked where it is a hub id.
        record: of the run that made it, where there is one.
        license_id: as the hub writes it, e.g. `apache-2.0`.
    """
    head = yaml.safe_dump(front_matter(archive, base, record, license_id), sort_keys=False)
    parts = [f"---\n{head}---", f"# {repo.partition('/')[2]}"]
    parts.append(_use_of_archive(repo, base) if archive else _use_of_checkpoint(repo, record))
    if record is not None:
        parts.append("## What the run measured")
        parts += [table.markdown().strip() for table in tables_of(_without_paths(record))]
    return "\n\n".join(parts) + "\n"


def front_matter(
    archive: bool, base: str, record: Record | None, license_id: str | None
) -> dict[str, Any]:
    """What the hub reads of a card: the base (where it is a hub id), tags, library, license."""
    kind = str((record or {}).get("kind", "compress" if archive else "model"))
    found: dict[str, Any] = {}
    if license_id:
        found["license"] = license_id
    found["library_name"] = "deltafold" if archive else "transformers"
    if is_hub_id(base) and not Path(base).exists():
        found["base_model"] = base.partition("@")[0]
        found["base_model_relation"] = "merge" if kind == "merge" else "finetune"
    found["tags"] = ["deltafold", *(["delta-compression"] if archive else [kind])]
    if not archive:
        found["pipeline_tag"] = "text-generation"
    return found


def license_of(*sources: str) -> str | None:
    """The license of the first of these models whose card names one.

    Local folders are read; of a hub id its card is fetched, and a hub that does not answer is as
    one without a card.
    """
    for source in sources:
        text = _card_text(source)
        head = _FRONT_MATTER.match(text)
        try:
            known = yaml.safe_load(head[1]) if head else None
        except yaml.YAMLError:
            known = None
        if isinstance(known, dict) and isinstance(known.get("license"), str):
            return str(known["license"])
    return None


def _card_text(source: str) -> str:
    file = Path(source).expanduser() / "README.md"
    if file.is_file():
        return file.read_text(encoding="utf-8", errors="replace")
    if not is_hub_id(source) or Path(source).exists():
        return ""
    from huggingface_hub import hf_hub_download

    repo, _, revision = source.partition("@")
    try:
        found = hf_hub_download(repo, "README.md", revision=revision or None)
        return Path(found).read_text(encoding="utf-8", errors="replace")
    except Exception:  # many kinds; a card is a courtesy, never a condition
        return ""


def _use_of_archive(repo: str, base: str) -> str:
    named = base if is_hub_id(base) else "BASE"
    told = f"`{base}`" if is_hub_id(base) else f"its base ({_plain(base) or 'a local folder'})"
    return (
        f"A fine-tune, stored as its difference from {told}. deltafold makes the whole model of "
        "both:\n\n"
        f"```\ndeltafold restore {repo} --base {named} -o restored/\n```\n\n"
        f'```python\nimport deltafold\n\nmodel = deltafold.load("{repo}", base="{named}")\n```\n\n'
        "A wrong base is refused: the archive knows each of its tensors by hash."
    )


def _use_of_checkpoint(repo: str, record: Record | None) -> str:
    kind = (record or {}).get("kind")
    how = {"merge": "Several fine-tunes in one model", "fold": "A model with fewer blocks"}
    told = how.get(str(kind), "A model")
    return (
        f"{told}, written by deltafold; an ordinary checkpoint:\n\n"
        "```python\nfrom transformers import AutoModelForCausalLM\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{repo}")\n```'
    )


def _without_paths(record: Record) -> Record:
    """The record with folders of this machine cut to their names: a card is public."""

    def short(value: Any) -> Any:
        if isinstance(value, str) and not is_hub_id(value) and "/" in value:
            return Path(value).name
        return value

    cut = {key: short(value) for key, value in record.items()}
    if isinstance(models := record.get("models"), list):
        cut["models"] = [short(each) for each in models]
    scores = record.get("scores")
    if isinstance(scores, list):
        cut["scores"] = [row | {"label": short(row.get("label"))} for row in scores]
    return cut


def _plain(text: str) -> str:
    """The last part of a path, without signs that Markdown would read."""
    return re.sub(r"[^\w .@-]", "", Path(text).name)
