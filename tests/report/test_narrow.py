"""Pages on a telephone, in a real browser: nothing is wider than 480 pixels but what scrolls."""

from __future__ import annotations

import html as escapes
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from dra_ray.bench import policy
from dra_ray.report import write
from dra_ray.storage import Store
from tests.bench.test_policy import SMALL

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
# a frame of the width, since a browser's own window has a least width
FRAME = """<!doctype html><iframe id="page" src="{page}" width="{width}" height="900"></iframe>
<pre id="found"></pre><script>
const frame = document.getElementById("page");
frame.onload = () => setTimeout(() => {{
  const page = frame.contentDocument, found = [];
  for (const part of page.querySelectorAll("main *")) {{
    const scrolls = part.closest(".scroll, .js-plotly-plot, pre, svg");
    const right = part.getBoundingClientRect().right;
    if (right > {width} && !scrolls) found.push([part.tagName, part.className, right]);
  }}
  const width = page.documentElement.scrollWidth, parts = page.querySelectorAll("main *").length;
  document.getElementById("found").textContent = JSON.stringify({{width, found, parts}});
}}, 3000);
</script>"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's package chromium")
@pytest.mark.parametrize("width", [480, 360])
@pytest.mark.parametrize("kind", ["quickstart", "sweep", "policy"])
def test_nothing_is_wider_than_a_narrow_page(
    kind: str, width: int, quickstart: Store, tmp_path: Path
) -> None:
    if kind == "policy":
        page = Store(str(tmp_path)) / "policy.html"
        outcomes = [policy.play(SMALL, "fixed", policy.Fixed(1))]
        outcomes.append(policy.play(SMALL, "suited", policy.suited(SMALL)))
        policy.write(page, SMALL, outcomes)
    else:
        page = write(quickstart / "sweep" if kind == "sweep" else quickstart)
    around = tmp_path / "frame.html"
    around.write_text(FRAME.format(page=f"file://{page.uri}", width=width))
    said = subprocess.run(
        [
            str(CHROMIUM),
            *("--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"),
            *(f"--user-data-dir={tmp_path}/profile", "--virtual-time-budget=20000"),
            *("--window-size=1280,1000", "--dump-dom", f"file://{around}"),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout
    match = re.search(r'<pre id="found">(.*?)</pre>', said, re.DOTALL)
    assert match, said[:2000]
    found = json.loads(escapes.unescape(match[1]))
    assert found["parts"] > 20
    assert found["found"] == []
    assert found["width"] <= width
