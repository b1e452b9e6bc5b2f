"""Opens pages in headless Chromium, which Debian's package of that name brings."""

import json
import re
import shutil
import subprocess
from html import unescape

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync
--disable-background-networking --disable-component-update --hide-scrollbars
--enable-logging=stderr --v=0 --virtual-time-budget=5000 --dump-dom""".split()
POLICY = "default-src 'none';"
# What a reader could see, for the page around this one.
LOOK = """<script>
addEventListener("load", () => {
  const images = [...document.images].map((one) => one.naturalWidth);
  const {scrollWidth, clientWidth} = document.documentElement;
  const svg = [...document.querySelectorAll("svg")];
  const charts = svg.map((one) => one.getBoundingClientRect().width);
  parent.postMessage(JSON.stringify({images, scrollWidth, clientWidth, charts}), "*");
});
</script>"""
# Windows are 500 pixels wide at least; frames are not.
AROUND = """<!doctype html><title></title>
<script>addEventListener("message", (event) => { document.title = event.data; });</script>
<iframe src="seen.html" style="width: {width}px; height: 2000px; border: 0"></iframe>"""


def look_at(page, folder, width):
    """What Chromium sees in a page at a width in pixels, and what its console says.

    Returns {"images": widths of the images, "charts": widths, "scrollWidth", "clientWidth",
    "console": lines}. Skips the test where there is no Chromium.
    """
    if (browser := next(filter(None, map(shutil.which, NAMES)), None)) is None:
        pytest.skip("no Chromium is on the PATH: apt-get install chromium")
    content = page.read_text(encoding="utf-8")
    assert content.count(POLICY) == 1 and "<script" not in content
    allowed = content.replace(POLICY, f"{POLICY} script-src 'unsafe-inline';")
    seen, around = folder / "seen.html", folder / "around.html"
    seen.write_text(allowed.replace("</body>", f"{LOOK}</body>"), encoding="utf-8")
    around.write_text(AROUND.replace("{width}", str(width)), encoding="utf-8")
    command = [browser, *OPTIONS, f"--user-data-dir={folder / 'profile'}", around.as_uri()]
    done = subprocess.run(command, capture_output=True, timeout=300)
    title = re.search(r"<title>(.+?)</title>", done.stdout.decode())
    assert title, done.stderr.decode()
    lines = [line for line in done.stderr.decode().splitlines() if "CONSOLE" in line]
    return {**json.loads(unescape(title[1])), "console": lines}
