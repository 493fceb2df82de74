"""Run the whole zoo and write its record: for every architecture and verb `right`, or why it is refused.

    python tests/zoo/whole_zoo.py                      all; make zoo
    python tests/zoo/whole_zoo.py LlamaForCausalLM     some, shown and not recorded

Anything else that comes of a verb is a fault: it is printed with its traceback, and no record is written.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RECORD = HERE.parents[1] / "benchmarks" / "records" / "zoo.json"
sys.path[:0] = [str(HERE), str(HERE.parent)]


def names() -> list[str]:
    """All of the zoo, in the order of the table."""
    from architectures import ALL
    from diffusion import DIFFUSION

    return [*ALL, *DIFFUSION]


def specimen(name: str, folder: Path) -> tuple[Any, dict[str, Any]]:
    """The models of a row, to be written under `folder`, and what is checked of them."""
    import checks
    import plain_checks
    from architectures import ALL

    if name in ALL:
        return checks.Specimen(ALL[name], folder), checks.VERBS
    return plain_checks.PlainSpecimen(name, folder), plain_checks.VERBS


def outcome(it: Any, verb: str, check: Any) -> str:
    """`right`, or the sentence of the refusal; whatever else is raised goes on."""
    from plain_checks import REFUSED, PlainSpecimen

    from deltafold.errors import DeltafoldError, DeltafoldWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeltafoldWarning)
        try:
            check(it)
        except DeltafoldError as error:
            said = str(error).replace(f"{it.folder}/", "")
            assert said.endswith(".") and "\n" not in said and "Traceback" not in said, said
            return said
    assert not (isinstance(it, PlainSpecimen) and verb in REFUSED), "nothing shows that it is right"
    return "right"


def row(name: str) -> dict[str, Any]:
    """The record's row of one architecture. `wrong` holds what no table may hold."""
    import torch
    from architectures import ALL

    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="zoo-"))
    os.environ["DELTAFOLD_CACHE"] = str(folder / "cache")
    made: dict[str, Any] = {
        "architecture": name, "group": ALL[name].group if name in ALL else "diffusion",
        "verbs": {}, "wrong": {},
    }  # fmt: skip
    try:
        it, verbs = specimen(name, folder)
        for verb, check in verbs.items():
            try:
                made["verbs"][verb] = outcome(it, verb, check)
            except Exception:
                made["wrong"][verb] = traceback.format_exc(limit=-6)
    finally:
        shutil.rmtree(folder)
    return made


def rows(chosen: list[str]) -> Iterator[dict[str, Any]]:
    """Rows of these architectures, told of as they come, in a process a core."""
    with ProcessPoolExecutor(int(os.environ.get("ZOO_WORKERS", os.cpu_count() or 1))) as pool:
        for made in pool.map(row, chosen):
            refused = {verb: said for verb, said in made["verbs"].items() if said != "right"}
            right = len(made["verbs"]) - len(refused)
            print(f"{made['architecture']:42s} {right} right, {len(refused)} refused", flush=True)
            for verb, said in refused.items():
                print(f"    {verb:8s} {said}", flush=True)
            for verb, said in made["wrong"].items():
                print(f"    {verb:8s} WRONG\n{said}", flush=True)
            yield made


def main() -> None:
    """Some or all; exit 1 where something is neither right nor refused."""
    chosen = sys.argv[1:] or names()
    found = list(rows(chosen))
    if any(made.pop("wrong") for made in found):
        sys.exit(1)
    if sys.argv[1:]:
        return
    packages = {name: version(name) for name in ("transformers", "torch", "peft")}
    record = {"record_version": 1, "kind": "zoo", "packages": packages, "rows": found}
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
