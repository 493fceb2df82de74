"""The page of a run: what it holds, that no text can break out, and how it behaves in a browser."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from browser import chromium
from reporting_records import COMMON, compress_record, evaluate_record, tensor
from test_reporting_merge import merge_record

from deltafold.errors import StorageError
from deltafold.reporting.page import page_html, write_page
from deltafold.reporting.page.places import MOST_LINES
from deltafold.reporting.units import bytes_text

EVIL = "</script><script>document.title='broken'</script><img src=x onerror=alert(1)>"


def answer(text: str, right: bool, prompt: str = "2 + 2 =") -> dict[str, Any]:
    return {"task": "sums", "prompt": prompt, "wanted": "4", "text": text, "right": right}


def scored_record(**more: Any) -> dict[str, Any]:
    """A compression with scores of three models and what they wrote."""
    models = evaluate_record()["models"]
    for model, text in zip(models, ("5", "4", "4"), strict=True):
        model["metrics"]["answers"] = [answer(text, text == "4")]
    command = "deltafold compress base/ math/ -o math.delta"
    return compress_record(blocks=3) | {"scores": models, "command": command} | more


def fold_record(**more: Any) -> dict[str, Any]:
    steps = [{"gone": [2], "kept": 1, "ratio": 0.7, "score": 0.98}]
    removed = {"blocks": [2], "layer_share": 0.25, "parameter_share": 0.2}
    return COMMON | {
        "kind": "fold", "output": "smaller", "method": {"name": "mka"}, "blocks": 4,
        "removed": removed, "kept": [0, 1, 3], "steps": steps,
        "similarity": {"name": "nip", "values": [[1 - abs(i - j) / 9 for j in range(5)]
                                                for i in range(5)]},
    } | more  # fmt: skip


def data_of(page: str) -> list[dict[str, Any]]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert found
    return json.loads(found[1])


def test_numbers_are_those_of_the_record() -> None:
    record = scored_record()
    (run,) = data_of(page_html([record]))
    values = {number["label"]: number["value"] for number in run["view"]["numbers"]}
    assert values["smaller"] == f"{record['totals']['file_ratio']:.1f}x"
    assert values["of answers right"] == "91\u00a0%" and values["KL from the fine-tune"] == "0.040"
    notes = {number["label"]: number["note"] for number in run["view"]["numbers"]}
    assert notes["of answers right"] == "sums, 200 rows: base 14\u00a0%, fine-tune 92.5\u00a0%"
    assert run["command"] == record["command"] and ["cores", "2"] in run["machine"]


def test_the_map_has_every_tensor_once_in_its_place() -> None:
    record = compress_record(blocks=3)
    (run,) = data_of(page_html([record]))
    found = run["view"]["map"]
    assert found["columns"] == ["all", "attention", "MLP", "norms"]
    assert [place["label"] for place in found["places"]] == ["embedding", "0", "1", "2"]
    names = [line["cells"][0] for place in found["places"] for line in place["lines"]]
    assert sorted(names) == sorted(each["name"] for each in record["tensors"])
    first = found["places"][1]
    stored = sum(each["bytes"] for each in record["tensors"] if each["block"] == 0)
    assert first["cells"][0]["texts"][0] == bytes_text(stored)
    assert [line["column"] for line in first["lines"]] == [1] * 4 + [2] * 3 + [3]
    shades = [s for p in found["places"] for c in p["cells"] if c for s in c["shades"]]
    assert all(shade is None or 0 <= shade <= 1 for shade in shades)


def test_answers_stand_side_by_side() -> None:
    (run,) = data_of(page_html([scored_record()]))
    (sample,) = run["view"]["samples"]
    written = [(each["label"], each["text"], each["right"]) for each in sample["written"]]
    assert written == [("base", "5", False), ("fine-tune", "4", True), ("restored", "4", True)]


def test_scores_are_among_the_tables() -> None:
    (run,) = data_of(page_html([scored_record()]))
    titles = [table["title"] for table in run["tables"]]
    assert titles[1:3] == ["On text", "Task sums"] and "Bytes by role" in titles


def test_an_evaluation_goes_into_the_page_of_its_archive() -> None:
    (run,) = data_of(page_html([compress_record(blocks=1), evaluate_record()]))
    assert "of answers right" in [number["label"] for number in run["view"]["numbers"]]
    other = evaluate_record()
    other["models"][-1]["label"] = "other.delta"
    assert len(data_of(page_html([compress_record(blocks=1), other]))) == 2


def test_no_text_breaks_out_of_its_place() -> None:
    record = scored_record(archive=f"out/{EVIL.replace('/', '')}.delta", command=EVIL)
    record["tensors"][0]["name"] = EVIL
    record["scores"][0]["metrics"]["answers"] = [answer(EVIL, False, EVIL), answer("&amp;", True)]
    page = page_html([record])
    assert page.count("<script") == 2 and page.count("</script>") == 2 and "<img" not in page
    (run,) = data_of(page)
    assert run["command"] == EVIL
    assert run["view"]["samples"][0]["prompt"] == EVIL


def test_placeholders_in_a_text_stay_text() -> None:
    (run,) = data_of(page_html([scored_record(command="{{title}} {{css}}")]))
    assert run["command"] == "{{title}} {{css}}"


def test_merge_and_fold_have_pages_of_their_own() -> None:
    merged, folded = data_of(page_html([merge_record(), fold_record()]))
    labels = [bar["label"] for bar in merged["view"]["picture"]["bars"]]
    assert labels == ["math", "x/sql", "y/sql"]
    assert len(merged["view"]["map"]["places"]) == 4
    cells = folded["view"]["map"]["places"][2]["cells"]
    assert cells[0]["texts"][0] == "into 1" and cells[1]["texts"][0] == "gone"
    hollow = [part["hollow"] for part in folded["view"]["picture"]["bars"][0]["segments"]]
    assert hollow == [False, False, True, False]


def test_a_kind_without_a_page_of_its_own_is_shown_by_its_tables() -> None:
    record = COMMON | {"kind": "verify", "archive": "a.delta", "ok": True}
    (run,) = data_of(page_html([record]))
    assert run["view"]["map"] is None and run["tables"]


def test_a_model_of_many_experts_gives_a_small_page() -> None:
    record = compress_record(blocks=1)
    experts = [
        tensor(f"model.layers.{b}.mlp.experts.{n}.up_proj.weight", "expert", b, (64, 32))
        for b in range(20)
        for n in range(1500)
    ]
    record["tensors"] += experts
    page = page_html([record])
    assert len(page.encode()) < 3_000_000
    (run,) = data_of(page)
    place = run["view"]["map"]["places"][1]
    assert len(place["lines"]) == MOST_LINES and "the others take" in place["summary"]


def test_same_record_same_page_and_nothing_from_elsewhere() -> None:
    page = page_html([scored_record()])
    assert page == page_html([scored_record()])
    loads = re.findall(r"(?:src|href|url\(|@import)\W*(?:https?:)?//\S+", page)
    assert loads == [] and "default-src 'none'" in page


def test_a_place_that_is_a_folder_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "page.html").mkdir()
    with pytest.raises(StorageError, match="cannot be written"):
        write_page([compress_record(blocks=1)], tmp_path / "page.html")
    assert [each.name for each in tmp_path.iterdir()] == ["page.html"]


# --- in a browser -------------------------------------------------------------------------------


def css(driver: Any, selector: str) -> list[Any]:
    return list(driver.find_elements("css selector", selector))


@pytest.mark.integration
def test_a_block_opens_to_its_tensors(tmp_path: Path) -> None:
    record = scored_record()
    record["tensors"][1]["name"] = f"model.layers.0.{EVIL}.weight"
    write_page([record, merge_record(), fold_record()], tmp_path / "page.html")
    with chromium() as driver:
        driver.get((tmp_path / "page.html").as_uri())
        assert "broken" not in driver.title
        assert css(driver, "dd")[0].text == f"{record['totals']['file_ratio']:.1f}x"
        block = next(
            each for each in css(driver, ".map tbody tr") if each.text.split()[:1] == ["1"]
        )
        block.find_element("css selector", "button").click()
        detail = css(driver, ".detail")[0]
        assert "Block 1" in detail.text and "self_attn.q_proj.weight" in detail.text
        assert len(css(driver, ".detail tbody tr")) == 8
        css(driver, ".map tbody button")[3].click()  # the MLP of block 0
        assert len(css(driver, ".detail tbody tr")) == 3
        before = css(driver, ".map tbody button")[1].text
        driver.execute_script("document.querySelector('.measures [value=\"2\"]').click()")
        assert css(driver, ".map tbody button")[1].text != before
        ground = "return getComputedStyle(document.body).backgroundColor"
        light = driver.execute_script(ground)
        css(driver, "#theme")[0].click()
        assert driver.execute_script(ground) != light
        assert len(css(driver, "svg rect")) > 10 and not css(driver, "img")
        assert driver.get_log("browser") == []


@pytest.mark.integration
def test_it_fits_a_phone(tmp_path: Path) -> None:
    write_page([scored_record(), merge_record(), fold_record()], tmp_path / "page.html")
    with chromium(390, 844) as driver:
        driver.get((tmp_path / "page.html").as_uri())
        driver.execute_script("for (const d of document.querySelectorAll('details')) d.open = true")
        assert driver.execute_script("return document.documentElement.scrollWidth") == 390
        css(driver, ".map tbody button")[1].click()
        close = css(driver, ".detail.open .close")[0]
        assert close.is_displayed()
        close.click()
        assert not css(driver, ".detail")[0].is_displayed()
