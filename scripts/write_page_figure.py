"""Write docs/figures/page.png: the top of the page of a real compression, in Chromium.

    python scripts/write_page_figure.py

The record was written by `compress --task` and lies in benchmarks/records. Needs chromium and
chromium-driver, selenium and pillow.
"""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path

from PIL import Image

from deltafold.reporting.page import write_page
from deltafold.running.record import read_record

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from browser import chromium  # noqa: E402

RECORD = ROOT / "benchmarks" / "records" / "page-smollm2.json"
FIGURE = ROOT / "docs" / "figures" / "page.png"
WIDTH, HEIGHT, PLACE = 1160, 1180, "Block 12, all"


def main() -> None:
    with tempfile.TemporaryDirectory() as name, chromium(WIDTH, HEIGHT) as driver:
        page = Path(name) / "page.html"
        write_page([read_record(RECORD)], page)
        driver.get(page.as_uri())
        place = driver.find_element("css selector", f'[data-about="{PLACE}"]')
        driver.execute_script("arguments[0].click()", place)
        picture = Image.open(io.BytesIO(driver.get_screenshot_as_png()))
    picture.convert("RGB").quantize(128).save(FIGURE, optimize=True)
    print(f"wrote {FIGURE} ({FIGURE.stat().st_size:,} bytes)")


if __name__ == "__main__":
    main()
