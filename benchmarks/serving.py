"""Exported fine-tunes on vLLM against the restored checkpoints: accuracy of each on its own task.

    python benchmarks/serving.py BASE NAME=FINETUNED=ARCHIVE=TASK.jsonl ... --vllm path/to/vllm
    python benchmarks/serving.py --into docs/commands/serve.md        # the table, from the record

One engine serves all fine-tunes over one base. Every row of a task goes to its own fine-tune, one
task after the other; then all rows of all tasks once more, mixed and several at a time, and last to
the base. Base, fine-tune and restored model answer the same rows through `evaluate`, in one dtype.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from adapters import MAX_TOKENS, Reference, Rows, Tune, hits, same

from deltafold.exporting.kept import Adapter
from deltafold.exporting.request import ServeRequest
from deltafold.exporting.serve import ServeError, Serving, prepare, served_names
from deltafold.reporting.markdown import rewrite_block
from deltafold.running.record import RECORD_VERSION, Record, machine, read_record, write_record

OUT = Path(__file__).parent / "records" / "serving.json"
AT_ONCE = 8


def ask(url: str, model: str, prompt: str) -> str:
    """One greedy completion, up to a line break."""
    body = {
        "model": model, "prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0, "stop": ["\n"],
    }  # fmt: skip
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=600) as answer:
        return str(json.loads(answer.read())["choices"][0]["text"])


def wait(url: str, process: subprocess.Popen[bytes], limit_seconds: float) -> float:
    """Seconds until the engine answers. Raises SystemExit if it ends, or takes too long."""
    start = time.perf_counter()
    while time.perf_counter() - start < limit_seconds:
        if process.poll() is not None:
            raise SystemExit(f"The engine ended with {process.returncode}.")
        try:
            served_names(url)
            return time.perf_counter() - start
        except ServeError:
            time.sleep(2)
    raise SystemExit(f"The engine did not answer within {limit_seconds:.0f} seconds.")


def served(url: str, tunes: list[Tune], rows: dict[str, Rows]) -> dict[str, Any]:
    """What each fine-tune answers alone, then mixed, and what the base answers; seconds."""
    base = next(iter(served_names(url)))
    jobs = {tune.name: [(tune.name, row.prompt) for row in rows[tune.name]] for tune in tunes}
    longest = max(map(len, jobs.values()))
    mixed = [(name, n) for n in range(longest) for name in jobs if n < len(jobs[name])]
    with ThreadPoolExecutor(AT_ONCE) as pool:

        def answers(asked: list[tuple[str, str]]) -> list[str]:
            return list(pool.map(lambda job: ask(url, *job), asked))

        start = time.perf_counter()
        alone = {name: answers(asked) for name, asked in jobs.items()}
        middle = time.perf_counter()
        again = answers([jobs[name][n] for name, n in mixed])
        end = time.perf_counter()
        plain = {name: answers([(base, prompt) for _, prompt in jobs[name]]) for name in jobs}
    texts: dict[str, list[str]] = {name: [] for name in jobs}
    for (name, _), text in zip(mixed, again, strict=True):
        texts[name].append(text)
    return {
        "alone": alone, "mixed": texts, "base": plain,
        "alone_seconds": middle - start, "mixed_seconds": end - middle,
    }  # fmt: skip


def row(tune: Tune, found: dict[str, Any], rows: Rows, reference: Reference) -> Record:
    """One row of the record."""
    alone, mixed = found["alone"][tune.name], found["mixed"][tune.name]
    return {
        "name": tune.name,
        **reference.row(),
        "dtype": reference.dtype,
        "served": hits(alone, rows),
        "served_mixed": hits(mixed, rows),
        "served_base": hits(found["base"][tune.name], rows),
        "same_as_restored": same(alone, reference.texts),
        "same_when_mixed": same(alone, mixed),
    }


def engine(serving: Serving, url: str, limit_seconds: float, log: Path) -> Any:
    """The engine, started, and how long that took."""
    environment = os.environ | serving.environment
    with log.open("wb") as out:
        process = subprocess.Popen(serving.command, env=environment, stdout=out, stderr=out)
    try:
        return process, wait(url, process, limit_seconds)
    except BaseException:
        process.terminate()
        raise


def exported(adapter: Adapter) -> Record:
    """What a row says of an adapter, from the record of its export."""
    keys = ("method", "adapter_bytes", "largest_rank", "relative_error", "relative_error_of_pairs")
    made = read_record(adapter.folder)
    return {key: made[key] for key in keys}


def table(record: Record) -> str:
    """The record as a Markdown table."""
    lines = [
        "| fine-tune | archive | rank | error of the delta | fine-tune itself | restored | served "
        "| served, requests mixed | the same answer as restored | the same when mixed | base "
        "| served base |",
        "|:--|:--|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    keys = (
        "finetuned", "restored", "served", "served_mixed", "same_as_restored", "same_when_mixed",
        "base", "served_base",
    )  # fmt: skip
    for each in record["rows"]:
        shown = " | ".join(f"{100 * each[key]:.1f} %" for key in keys)
        made = f"`{each['method']}` | {each['largest_rank']} | {each['relative_error']:.3f}"
        lines.append(f"| {each['name']} | {made} | {shown} |")
    found, used, rows = record["machine"], record["settings"], record["rows"]
    sizes = ", ".join(f"{each['adapter_bytes'] / 1e6:.0f} MB" for each in rows)
    note = (
        f"Share of {used['limit']} held-out rows of its task answered to the letter, by fine-tunes "
        f"of {used['base']}. Rank: the largest; adapters of {sizes}. Mixed: the rows of all in "
        f"turn, {AT_ONCE} requests at a time. vLLM and the models beside it compute in "
        f"{rows[0]['dtype']}, but not in one order; what vLLM says ends at the first line break, even "
        f"a leading one. {sum(used['rows'].values())} answers took "
        f"{record['alone_seconds']:.0f} s, mixed {record['mixed_seconds']:.0f} s; start "
        f"{record['start_seconds']:.0f} s, on a machine that did other work too. vLLM "
        f"{record['engine']}, {found['cpu']}, {found['cores']} cores."
    )
    return "\n".join([*lines, "", note])


def main() -> None:
    """Parse, serve, ask, compare, write the record; or the table from the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", nargs="?")
    parser.add_argument("tunes", nargs="*", type=Tune.parse, metavar="NAME=FINETUNED=ARCHIVE=TASK")
    parser.add_argument("--vllm", type=Path)
    parser.add_argument("--rank", type=int)
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--start-limit", type=float, default=1200, help="seconds")
    parser.add_argument("--log", type=Path, default=Path("serving.log"))
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--into", type=Path, help="Markdown file: write the table, measure nothing")
    parser.add_argument("--engine-options", default="", help="for vllm serve, in one string")
    asked = parser.parse_args()
    if asked.into:
        rewrite_block(asked.into, "serving", table(json.loads(asked.out.read_text())))
        return
    rows = {tune.name: tune.rows(asked.limit) for tune in asked.tunes}
    deltas = {tune.name: tune.archive for tune in asked.tunes}
    serving = prepare(
        ServeRequest(
            asked.base, shlex.split(asked.engine_options), delta=deltas, vllm=asked.vllm,
            rank=asked.rank, port=asked.port,
        )
    )  # fmt: skip
    url = f"http://127.0.0.1:{asked.port}"
    process, start_seconds = engine(serving, url, asked.start_limit, asked.log)
    try:
        found = served(url, asked.tunes, rows)
        with urllib.request.urlopen(f"{url}/version", timeout=60) as answer:
            version = json.loads(answer.read())["version"]
    finally:
        process.terminate()
        process.wait()
    record: Record = {
        "record_version": RECORD_VERSION,
        "kind": "serving",
        "engine": version,
        "start_seconds": start_seconds,
        "alone_seconds": found["alone_seconds"],
        "mixed_seconds": found["mixed_seconds"],
        "rows": [
            row(tune, found, rows[tune.name], Reference.measure(asked.base, tune, asked.limit))
            | exported(adapter)
            for tune, adapter in zip(asked.tunes, serving.adapters, strict=True)
        ],
        "settings": {
            "base": Path(asked.base).name,
            "rank": asked.rank,
            "limit": asked.limit,
            "rows": {name: len(each) for name, each in rows.items()},
            "engine_options": asked.engine_options,
        },
        "machine": machine(),
    }
    write_record(record, asked.out)
    print(table(record))


if __name__ == "__main__":
    main()
