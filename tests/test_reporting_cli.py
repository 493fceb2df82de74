"""`deltafold report` as a user runs it, and what it must not import."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from reporting_records import benchmark_record, compress_record
from typer.testing import CliRunner

from deltafold.cli.report import report
from deltafold.errors import UsageError

app = typer.Typer()
app.command()(report)


@pytest.fixture
def record(tmp_path: Path) -> Path:
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(benchmark_record(("impart", "magnitude"))))
    return path


def test_everything_at_once(tmp_path: Path, record: Path) -> None:
    other = tmp_path / "math.delta.record.json"
    other.write_text(json.dumps(compress_record(blocks=2)))
    readme = tmp_path / "README.md"
    readme.write_text("<!-- r:begin -->\n<!-- r:end -->\n")
    arguments = [str(record), str(other), "--markdown", str(tmp_path / "out" / "report.md")]
    arguments += ["--figures", str(tmp_path / "figures"), "--into", str(readme), "--marker", "r"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert "0 (exact)" in result.output
    assert len(list((tmp_path / "figures").glob("*.png"))) == 4
    text = (tmp_path / "out" / "report.md").read_text()
    assert "](<../figures/size-and-quality-arithmetic.png>)" in text
    block = readme.read_text()
    assert block.startswith("<!-- r:begin -->\n\n**SmolLM2-135M: arithmetic**")
    assert "**Bytes by role**" in block
    assert "png" not in block


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--into", "README.md"], "belong together"),
        (["--marker", "r"], "belong together"),
        (["--dark"], "give --figures"),
    ],
)
def test_settings_that_cannot_be(record: Path, options: list[str], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        CliRunner().invoke(app, [str(record), *options], catch_exceptions=False)


def test_tables_need_neither_torch_nor_matplotlib() -> None:
    code = (
        "import sys, deltafold.cli.report, deltafold.reporting.tables, "
        "deltafold.reporting.figures; "
        "print(sorted({'torch', 'transformers', 'matplotlib', 'numpy'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
