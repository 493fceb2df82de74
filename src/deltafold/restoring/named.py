"""What base and fine-tune of an archive are called: no archive says it, the record beside it does.

The same weights give the same archive, whatever their folders are called. Older
archives have the names of the folders in them.
"""

from __future__ import annotations

from deltafold.archive import Archive
from deltafold.errors import DeltafoldError
from deltafold.running.record import read_record


def names_of(archive: Archive) -> tuple[str, str]:
    """Base and fine-tune of an archive as its run was given them; "" for what is not known."""
    manifest = archive.manifest
    found = manifest.base.label, manifest.finetuned.label
    if any(found):
        return found
    try:
        record = read_record(archive.folder)
    except DeltafoldError:
        return "", ""
    return str(record.get("base") or ""), str(record.get("finetuned") or "")


def give_base(archive: Archive) -> str:
    """The end of a sentence that asks for the base."""
    base, _ = names_of(archive)
    return f"give the base it was made from ({base})" if base else "give the base it was made from"
