"""The documents are true: the format page, the commands, the links, the table of codecs."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import importlib.util
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import format_reader as reader
import numpy as np
import pytest
import torch
import typer
from checkpoints import WIDTH, PairFiles, Tensors, decaying_delta, make_pair

import deltafold
from deltafold.cli import app
from deltafold.codecs import delta_codec, exact_codec, get, names
from deltafold.compressing.catalogue import methods
from deltafold.linalg.matrices import DenseMatrix, Fisher

ROOT = Path(__file__).parents[1]
FORMAT = ROOT / "docs" / "format.md"
PAGES = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("demo/**/*.md")})
# Typer brings a click of its own; this is that one's ClickException.
NotACommand: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")
FENCE = re.compile(r"^ *```(\w*)[^\n]*\n(.*?)^ *```", re.M | re.S)


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


# The format page, against a reader that knows nothing but it


def vectors(kind: str) -> list[dict[str, Any]]:
    """The test vectors that the format page quotes."""
    text = FORMAT.read_text(encoding="utf-8")
    found = re.search(rf"<!-- vectors: {kind} -->\n```json\n(.*?)```", text, re.S)
    assert found, f"docs/format.md has no vectors {kind}"
    return json.loads(found.group(1))


def test_vectors_digest():
    from deltafold.archive import TensorDigest

    for row in vectors("digest"):
        data = bytes.fromhex(row["bytes"])
        stored = reader.Stored(row["dtype"], tuple(row["shape"]), data)
        assert (reader.digest(stored, 32), reader.digest(stored, 16)) == (
            row["tensor"],
            row["part"],
        )
        ours = TensorDigest(row["dtype"], row["shape"])
        ours.update(memoryview(data))
        assert (ours.identity(), ours.checksum()) == (row["tensor"], row["part"])


def test_vectors_elias_fano():
    from deltafold.coding.packing import EliasFano

    for row in vectors("elias-fano"):
        low, high = bytes.fromhex(row["low"]), bytes.fromhex(row["high"])
        positions, universe = row["positions"], row["universe"]
        assert reader.elias_fano(low, high, len(positions), universe).tolist() == positions
        coded = EliasFano(len(positions), universe).encode(torch.tensor(positions).numpy())
        assert [part.tobytes() for part in coded] == [low, high]


def test_vectors_run_of_codes():
    from deltafold.coding.packing import unpack_u8
    from deltafold.coding.quantizer import Grid, dequantise

    for row in vectors("run"):
        codes, width, count = bytes.fromhex(row["codes"]), row["width"], len(row["values"])
        scales, unit = torch.tensor(row["scales"]), 2.0 ** row["unit_exponent"]
        assert reader.run(codes, scales.numpy(), width, count, unit).tolist() == row["values"]
        unpacked = torch.from_numpy(unpack_u8(np.frombuffer(codes, np.uint8), width, count))
        found = dequantise(unpacked, Grid(width), scales.half(), None, unit)
        assert found.tolist() == row["values"]


def test_vectors_bit_difference():
    from deltafold.coding.planes import bit_pattern, difference

    for row in vectors("bit-difference"):
        swapped = {key: [word[2:] + word[:2] for word in words] for key, words in row.items()}
        value, reference = (
            torch.frombuffer(bytearray.fromhex("".join(swapped[key])), dtype=torch.bfloat16)
            for key in ("value", "reference")
        )
        z = difference(value, reference)
        assert [f"{word:04x}" for word in z] == row["z"]
        undone = reader.undo_difference(z, bit_pattern(reference), "BF16")
        assert [f"{word:04x}" for word in undone] == row["value"]


def test_vectors_randomness():
    from deltafold.coding import counter
    from deltafold.restoring.decode import piece_key

    for row in vectors("key"):
        arguments = (row["seed"], row["tensor"], row["first_row"])
        assert reader.derive_key(*arguments) == piece_key(*arguments) == int(row["key"], 16)
    for row in vectors("random"):
        key, numbers = int(row["key"], 16), [int(number, 16) for number in row["numbers"]]
        assert reader.random_u64(key, 0, len(numbers)).tolist() == numbers
        assert counter.random_u64(key, 0, len(numbers)).tolist() == numbers
    for row in vectors("threshold"):
        key, total, threshold = int(row["key"], 16), row["total"], int(row["threshold"], 16)
        assert reader.below_threshold(key, total, threshold).tolist() == row["positions"]
        assert counter.kept_positions(key, 0, total, threshold).tolist() == row["positions"]
    for row in vectors("subset"):
        arguments = (int(row["key"], 16), row["column"], row["size"], row["keep"])
        assert reader.subset(*arguments).tolist() == row["positions"]
        assert counter.subset(*arguments).tolist() == row["positions"]


def test_vectors_dither():
    from deltafold.coding import dither

    for row in vectors("thresholds"):
        key, expected = int(row["key"], 16), row["thresholds"]
        assert reader.thresholds(key, len(expected)).tolist() == expected
        assert dither.thresholds(key, 0, len(expected)).tolist() == expected
    for row in vectors("odds"):
        assert reader.table(row["odds"]) == row["counts"]
        (ours,) = dither.tables_of(np.array([row["odds"]], dtype=np.uint8))
        assert ours.counts.tolist() == row["counts"]


def test_vectors_auto():
    for row in vectors("auto"):
        code, key, shape = bytes.fromhex(row["code"]), int(row["key"], 16), tuple(row["shape"])
        rows, columns = (2.0 ** (np.array(row[k]) / 2) for k in ("rows", "columns"))
        expected = np.array(row["levels"]) * row["unit"] * rows[:, None] * columns
        assert np.allclose(reader.dithered(code, shape, key), expected, rtol=1e-6)
        part = torch.frombuffer(bytearray(code), dtype=torch.uint8)
        found = auto_delta({"code": part}, {"step": 1.0, "n_bytes": len(code)}, shape, key)
        assert np.array_equal(found, reader.dithered(code, shape, key))


def auto_delta(parts: Any, chosen: Any, shape: tuple[int, int], key: int) -> np.ndarray:
    rows = delta_codec("auto").decode(parts, chosen, shape, key)
    return torch.cat([block for _, block in rows]).numpy()


@pytest.mark.parametrize("step", [0.3, 1.5, 20])
@pytest.mark.parametrize("uneven", [False, True], ids=["even", "rows of all sizes"])
@pytest.mark.parametrize("weighed", [False, True], ids=["one step", "steps by cost"])
@pytest.mark.parametrize("rank", [0, 2])
def test_the_page_s_reader_decodes_auto(rank: int, weighed: bool, uneven: bool, step: float):
    """Steps by row and column, rows of zeros, corrections: more than the archives below hold."""
    shape, key, generator = (30, 37), 77, torch.Generator().manual_seed(1)
    delta = 0.01 * torch.randn(*shape, generator=generator)
    if uneven:
        delta *= 10 ** torch.linspace(-3, 0, 30)[:, None]
        delta[4] = 0
    codec = delta_codec("auto")
    cost = Fisher(10 ** torch.linspace(-2, 1, 30), 10 ** torch.linspace(-1, 1, 37))
    matrix = DenseMatrix(delta, cost if weighed else None)
    chosen, parts = codec.encode(matrix, {"step": step, "rank": rank}, key)
    if rank:  # as after training: no longer zero
        fix = parts["fix"].numpy().copy()
        fix[8 * rank :] = torch.randint(256, (len(fix) - 8 * rank,), generator=generator).numpy()
        parts["fix"] = torch.from_numpy(fix)
    stored = {k: reader.Stored("U8", tuple(v.shape), v.numpy().tobytes()) for k, v in parts.items()}
    found = reader.auto(stored, chosen, shape, key)
    assert np.array_equal(found, auto_delta(parts, chosen, shape, key))
    assert (found.any() or step == 20) and (rank or not uneven or not found[4].any())


def everything(base: Tensors, tuned: Tensors) -> None:
    """Adds to a pair what archives may hold beside plain matrices."""
    generator = torch.Generator().manual_seed(5)
    dtype, tuned_dtype = base["lm_head.weight"].dtype, tuned["lm_head.weight"].dtype
    head = tuned["lm_head.weight"].float()
    head[::3] += decaying_delta((len(head[::3]), WIDTH), generator)  # some rows
    tuned["lm_head.weight"] = head.to(tuned_dtype)
    words = tuned["model.embed_tokens.weight"]
    tuned["model.embed_tokens.weight"] = torch.cat([words, words[:8] * 2])  # new rows
    keys = tuned["model.layers.0.self_attn.k_proj.weight"].clone()
    keys[:4, :5] *= 1.02  # few values
    tuned["model.layers.0.self_attn.k_proj.weight"] = keys
    stack = 0.05 * torch.randn(3, 32, WIDTH, generator=generator)
    base["model.layers.0.mlp.experts.up_proj"] = stack.to(dtype)
    delta = decaying_delta((64, WIDTH), generator).reshape(2, 32, WIDTH)
    stack[1:] = stack[1:].to(dtype).float() + delta  # a stack, its first matrix equal
    tuned["model.layers.0.mlp.experts.up_proj"] = stack.to(tuned_dtype)
    for tensors in (base, tuned):  # twins
        tensors["model.layers.1.twin.weight"] = tensors["model.layers.1.mlp.up_proj.weight"].clone()
    base["gone.weight"] = torch.ones(3)
    tuned["new.weight"] = torch.randn(20, 20, generator=generator).to(tuned_dtype)
    base["steps"], tuned["steps"] = torch.arange(5), torch.arange(5) * 3 - 2
    base["mask"], tuned["mask"] = torch.zeros(5, dtype=torch.bool), torch.ones(5, dtype=torch.bool)
    base["model.layers.1.mlp.gate_proj.weight"][0, 0] = -0.0


@pytest.fixture(scope="module", params=["bf16", "fp16", "bf16 to fp32", "fp32 to bf16"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PairFiles:
    """Base and fine-tune in several dtypes, equal ones and not."""
    dtype = torch.float16 if request.param == "fp16" else torch.bfloat16
    tuned_dtype = torch.float32 if request.param == "bf16 to fp32" else dtype

    def edit(base: Tensors, tuned: Tensors) -> None:
        everything(base, tuned)
        if request.param == "fp32 to bf16":
            for name, tensor in base.items():  # values that bf16 does not have
                base[name] = tensor.float() * 1.001 if tensor.dtype == dtype else tensor

    folder = tmp_path_factory.mktemp("pair")
    made = make_pair(
        folder, dtype=dtype, tuned_dtype=tuned_dtype, edit=edit, config={"extra": [*range(50)]}
    )
    (made.finetuned / "chat_template.jinja").write_text("{{ messages }}\n")
    return made


@pytest.mark.integration
@pytest.mark.parametrize("method", [name for name in names() if get(name).method])
def test_a_reader_written_from_the_page_restores_every_bit(
    pair: PairFiles, method: str, tmp_path: Path
):
    lossy = get(method).lossy
    for value_dtype in ("fp16", "bf16") if lossy else (None,):
        archive, restored = tmp_path / f"{value_dtype}.delta", tmp_path / f"{value_dtype}"
        options = {"file_ratio": 6, "value_dtype": value_dtype} if lossy else {}
        deltafold.compress(pair.base, pair.finetuned, archive, method, seed=7, **options)
        deltafold.restore(archive, pair.base, restored)
        theirs, ours = reader.restore(archive, pair.base), reader.read_folder(restored)
        assert theirs.keys() == ours.keys()
        assert [name for name in theirs if theirs[name] != ours[name]] == []
        found = reader.side_files(archive, pair.base)
        assert found == {name: (restored / name).read_bytes() for name in found}
        assert {"config.json", "tokenizer.json", "chat_template.jinja"} == set(found)
        codecs = {p["codec"] for e in manifest(archive)["tensors"] for p in e.get("pieces", [])}
        assert method in codecs
        if not lossy:
            assert reader.read_folder(pair.finetuned) == theirs


def manifest(archive: Path) -> dict[str, Any]:
    return json.loads((archive / "delta.json").read_text())


def test_the_archives_above_cover_the_format(tmp_path: Path):
    """Else the test above would prove less than it says."""
    pair = make_pair(tmp_path, edit=everything, config={"extra": [*range(50)]})
    (pair.finetuned / "chat_template.jinja").write_text("{{ messages }}\n")
    codecs, seen = set(), set()
    for method, n_bytes in (("lossless", None), ("sparse-patch", None), ("impart", 60_000)):
        archive = tmp_path / method
        deltafold.compress(pair.base, pair.finetuned, archive, method, n_bytes=n_bytes)
        found = manifest(archive)
        seen |= {entry["stored"] for entry in found["files"]}
        for entry in found["tensors"]:
            pieces = entry.get("pieces", [])
            codecs |= {piece["codec"] for piece in pieces}
            seen |= {key for key in entry if key == "same_as"}
            seen |= {piece.get("reference", "base") for piece in pieces}
            seen |= {part for piece in pieces for part in piece.get("parts", {})}
            seen |= {"pieces"} if len(pieces) > 1 else set()
    assert codecs >= {"skip", "context", "lossless", "sparse-patch", "impart"}
    wanted = {"base", "zstd", "zstd-base", "none", "same_as", "pieces", "low", "bitmap"}
    assert wanted <= seen
    text = FORMAT.read_text(encoding="utf-8")
    assert [name for name in names() if f"\n### {name}\n" not in text] == []


@pytest.mark.parametrize("name", ["lossless", "sparse-patch", "rows", "context"])
def test_the_reader_undoes_each_exact_codec(name: str):
    """`rows` stands in archives where nothing else is smaller, which is seldom."""
    base = torch.randn(40, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    tuned = base.clone()
    tuned[[3, 4, 31]] *= -1.01
    settings, parts = exact_codec(name).encode(base, tuned)
    stored = {
        part: reader.Stored("U8", tuple(data.shape), data.numpy().tobytes())
        for part, data in parts.items()
    }
    bits = base.view(torch.int16).numpy().view("<u2")
    found = reader.EXACT[name](stored, settings, bits, "BF16")
    assert (found == tuned.view(torch.int16).numpy().view("<u2")).all()


def test_every_field_of_the_manifest_is_on_the_page():
    from deltafold.archive import manifest as model

    text = FORMAT.read_text(encoding="utf-8")
    for part in (model.Manifest, model.Tensor, model.Piece, model.SideFile, model.PayloadFile):
        assert [name for name in part.model_fields if f"`{name}`" not in text] == []


# Commands, links, code


def commands(page: Path) -> Iterator[str]:
    """Each `deltafold ...` line of the page's code blocks, continued lines joined."""
    for _, body in FENCE.findall(page.read_text(encoding="utf-8")):
        for line in body.replace("\\\n", " ").splitlines():
            line = line.strip().removeprefix("$ ")
            if re.match(r"deltafold( |$)", line):
                yield line


@functools.cache
def commands_of_the_program() -> Any:
    """Click's own form of the command line; typer reads every signature for it."""
    return typer.main.get_command(app)


def check_command(line: str) -> None:
    """Parse a command line without running it. Raises NotACommand."""
    group = commands_of_the_program()
    words = re.split(r" (?:[|>]|&&|2>)", line)[0]
    arguments = shlex.split(words, comments=True)[1:]
    if not arguments or arguments[0] in ("--help", "-h", "--version"):
        return
    if arguments[0] not in group.commands:
        raise typer.BadParameter(f"no command {arguments[0]}")
    if not {"--help", "-h"} & set(arguments):
        group.commands[arguments[0]].make_context(arguments[0], arguments[1:])


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_command_line_parses(page: Path):
    for line in commands(page):
        try:
            check_command(line)
        except NotACommand as error:
            pytest.fail(f"{line}: {error.format_message()}")


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_command_named_in_a_sentence_exists(page: Path):
    group = commands_of_the_program()
    for line in re.findall(r"`deltafold ([^`]+)`", FENCE.sub("", page.read_text(encoding="utf-8"))):
        name, *words = line.split()
        if name.startswith("-"):
            continue
        assert name in group.commands, f"deltafold {line}"
        known = {word for parameter in group.commands[name].params for word in parameter.opts}
        assert {word for word in words if word.startswith("-")} <= known, f"deltafold {line}"


def test_a_wrong_command_line_is_noticed():
    for line in ("deltafold squeeze a b", "deltafold plan a b --retio 3", "deltafold verify"):
        with pytest.raises(NotACommand):
            check_command(line)


@pytest.mark.parametrize("name", sorted(commands_of_the_program().commands))
def test_the_table_of_options_is_the_requests(name: str):
    """After a change: python scripts/write_option_tables.py."""
    spec = importlib.util.spec_from_file_location("tables", ROOT / "scripts/write_option_tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    page = ROOT / "docs" / "commands" / f"{name}.md"
    assert page.read_text(encoding="utf-8") == tables.page_with_table(name)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_pages_use_the_names_of_today(page: Path):
    """No former option in a command line, nor in the page of its command."""
    group = commands_of_the_program()
    text = page.read_text(encoding="utf-8")
    lines = [
        *commands(page),
        *(f"deltafold {rest}" for rest in re.findall(r"`deltafold ([^`]+)`", text)),
    ]
    if page.parent.name == "commands":
        lines += [
            f"deltafold {page.stem} {found}" for found in re.findall(r"`([^`\n]*--[^`\n]*)`", text)
        ]
    used = set()
    for line in lines:
        words = line.split()[1:]
        if words and words[0] in group.commands:
            params = group.commands[words[0]].params
            today = {word for p in params if not getattr(p, "hidden", False) for word in p.opts}
            former = {word for p in params if getattr(p, "hidden", False) for word in p.opts}
            used |= {f"{words[0]} {word}" for word in words if word in former - today}
    assert used == set()


def test_every_command_has_a_page():
    group = commands_of_the_program()
    for name, command in group.commands.items():
        page = ROOT / "docs" / "commands" / f"{name}.md"
        assert any(f"deltafold {name}" in line for line in commands(page)), f"{page} has no example"
        shown = [p for p in command.params if not getattr(p, "hidden", False)]  # no former names
        options = {word for p in shown for word in p.opts if word.startswith("--")}
        text = page.read_text(encoding="utf-8")
        assert sorted(option for option in options if option not in text) == []


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_relative_link_leads_somewhere(page: Path):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    links = re.findall(r"\]\(<?([^)\s>]+)>?\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = link.partition("#")
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), f"{page_id(page)} links to {link}"
        assert file.is_relative_to(ROOT), f"{page_id(page)} links out of the repository: {link}"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), f"{page_id(page)} links to {link}"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_python_examples_use_what_exists(page: Path):
    for language, body in FENCE.findall(page.read_text(encoding="utf-8")):
        if language != "python":
            continue
        for node in ast.walk(ast.parse(body)):
            if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "deltafold":
                assert hasattr(deltafold, node.attr), f"deltafold.{node.attr}"
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("deltafold"):
                module = importlib.import_module(node.module or "")
                assert [a.name for a in node.names if not hasattr(module, a.name)] == []


def test_the_table_of_codecs_is_what_the_program_says():
    script = ROOT / "scripts" / "write_codec_table.py"
    spec = importlib.util.spec_from_file_location("write_codec_table", script)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = (ROOT / "docs" / "codecs.md").read_text(encoding="utf-8")
    assert module.with_table(page, methods()) == page, f"run {script.relative_to(ROOT)}"
    assert [name for name in names() if f"\n## {name}\n" not in page] == []


def test_the_table_of_the_zoo_is_the_records() -> None:
    """After `make zoo`: python scripts/write_zoo_table.py."""
    spec = importlib.util.spec_from_file_location("zoo", ROOT / "scripts/write_zoo_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = module.PAGE.read_text(encoding="utf-8")
    assert module.with_table(page, json.loads(module.RECORD.read_text())) == page
    with pytest.raises(ValueError, match="no kind of refusal"):
        module.kind_of("It does not want to.")


def test_the_manifest_is_sealed_as_the_page_says(tmp_path: Path):
    pair = make_pair(tmp_path)
    deltafold.compress(pair.base, pair.finetuned, tmp_path / "a.delta", "lossless")
    raw = (tmp_path / "a.delta" / "delta.json").read_bytes()
    body, _, rest = raw.rpartition(b',"checksum":"')
    assert rest == hashlib.sha256(body).hexdigest()[:32].encode() + b'"}\n'
