"""Exported fine-tunes on vLLM against the restored checkpoints: accuracy of each on its own task.

    python benchmarks/serving.py BASE NAME=FINETUNED=ARCHIVE=TASK.jsonl ... --vllm path/to/vllm
    python benchmarks/serving.py --into docs/commands/serve.md        # the table, from the record

One engine serves all fine-tunes over one base. Every row of a task goes to its own fine-tune, one
task after the other; then all rows of all tasks once more, mixed and several at a time: each must
give the answer that it gave before. Restored models answer the same rows through `evaluate`.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltafold.evaluation import evaluate
from deltafold.evaluation.data import AnswerRow, read_tasks
from deltafold.evaluation.exact_match import first_lines
from deltafold.record import RECORD_VERSION, Record, machine, write_record
from deltafold.reporting.markdown import rewrite_block
from deltafold.verbs.serve import ServeError, Serving, prepare, served_names

OUT = Path(__file__).parent / "records" / "serving.json"
MAX_TOKENS = 24
AT_ONCE = 8


@dataclass(frozen=True)
class Tune:
    """A fine-tune, its archive, and the rows of its task."""

    name: str
    finetuned: str
    archive: str
    task: str

    @classmethod
    def parse(cls, text: str) -> Tune:
        parts = text.split("=")
        if len(parts) != 4:
            raise SystemExit(f"{text!r} is not NAME=FINETUNED=ARCHIVE=TASK.jsonl.")
        return cls(*parts)


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


def served(url: str, tunes: list[Tune], rows: dict[str, tuple[AnswerRow, ...]]) -> dict[str, Any]:
    """Answers of each fine-tune alone, then mixed; and of the first one's rows to the base."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        alone: dict[str, list[str]] = {}
        start = time.perf_counter()
        for tune in tunes:
            asked = rows[tune.name]
            alone[tune.name] = list(pool.map(lambda r, t=tune: ask(url, t.name, r.prompt), asked))
        middle = time.perf_counter()
        longest = max(map(len, rows.values()))
        mixed = [(t.name, n) for n in range(longest) for t in tunes if n < len(rows[t.name])]
        again = list(pool.map(lambda job: ask(url, job[0], rows[job[0]][job[1]].prompt), mixed))
        end = time.perf_counter()
    same = [text == alone[name][n] for (name, n), text in zip(mixed, again, strict=True)]
    return {
        "alone": {name: hits(texts, rows[name]) for name, texts in alone.items()},
        "mixed": {
            tune.name: hits(
                [text for (name, _), text in zip(mixed, again, strict=True) if name == tune.name],
                rows[tune.name],
            )
            for tune in tunes
        },
        "mixed_requests": len(mixed),
        "mixed_same_answer": sum(same),
        "alone_seconds": middle - start,
        "mixed_seconds": end - middle,
    }


def hits(texts: list[str], rows: tuple[AnswerRow, ...]) -> float:
    """Share of rows answered to the letter."""
    right = [first_lines(t, 1) == r.answer.strip() for t, r in zip(texts, rows, strict=True)]
    return sum(right) / len(right)


def restored(base: str, tune: Tune, limit: int) -> dict[str, float]:
    """Exact match of the fine-tune and of the restored model, by `evaluate`."""
    record = evaluate(tune.finetuned, [tune.archive], base, [tune.task], limit=limit)
    name = Path(tune.task).stem
    shares = {
        entry["role"]: float(entry["metrics"]["tasks"][name]["exact_match"]["value"])
        for entry in record["models"]
    }
    return {
        "base": shares["base"],
        "finetuned": shares["fine-tune"],
        "restored": shares["candidate"],
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


def table(record: Record) -> str:
    """The record as a Markdown table."""
    lines = [
        "| task | base | fine-tune | restored | served adapter | served, requests mixed | error of the delta |",
        "|:--|--:|--:|--:|--:|--:|--:|",
    ]
    for row in record["rows"]:
        cells = [row[key] for key in ("base", "finetuned", "restored", "served", "served_mixed")]
        shown = " | ".join(f"{100 * cell:.1f} %" for cell in cells)
        lines.append(f"| {row['name']} | {shown} | {row['relative_error']:.3f} |")
    found, used = record["machine"], record["settings"]
    note = (
        f"Share of {used['limit']} held-out rows answered to the letter. Mixed: the rows of all "
        f"tasks in turn, {AT_ONCE} requests at a time; {record['mixed_same_answer']} of "
        f"{record['mixed_requests']} got the answer that they got before. Adapters: rank "
        f"{used['rank'] or 'by default'}, {record['adapter_bytes'] / 1e6:.1f} MB each; vLLM "
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
    parser.add_argument("--limit", type=int, default=60)
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
    rows = {t.name: read_tasks([t.task], asked.limit)[0].answer_rows for t in asked.tunes}
    serving = prepare(
        asked.base, {t.name: t.archive for t in asked.tunes}, vllm=asked.vllm, rank=asked.rank,
        port=asked.port, extra=shlex.split(asked.engine_options),
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
    print(json.dumps(found), flush=True)
    sizes = [sum(f.stat().st_size for f in a.folder.iterdir()) for a in serving.adapters]
    made = {each.name: each for each in serving.adapters}
    record: Record = {
        "record_version": RECORD_VERSION,
        "kind": "serving",
        "engine": version,
        "start_seconds": start_seconds,
        "adapter_bytes": sum(sizes) / len(sizes),
        "rows": [
            {
                "name": t.name,
                "served": found["alone"][t.name],
                "served_mixed": found["mixed"][t.name],
                "relative_error": made[t.name].relative_error,
                **restored(asked.base, t, asked.limit),
            }
            for t in asked.tunes
        ],
        "settings": {"base": Path(asked.base).name, "rank": asked.rank, "limit": asked.limit},
        "machine": machine(),
    } | {key: found[key] for key in found if key not in ("alone", "mixed")}
    write_record(record, asked.out)
    print(table(record))


if __name__ == "__main__":
    main()
