"""A page of ours in headless Chromium, as a reader has it: from a file, without a server."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_chromium = pytest.mark.skipif(not CHROMIUM, reason="no chromium: Debian's package of that name")


def told_by(page, script, folder, width_px=1200):
    """What the JavaScript `script` gives to `tell(value)` when the page has loaded, and what failed in it.

    Returns (value, messages of errors). `folder` keeps what a browser knows from one visit to the next: a new
    one is a new reader. Chromium has no window narrower than 500 px.
    """
    # an error of the page's own scripts shows only to a listener that was there before them
    listen = "const problems = []; addEventListener('error', (event) => problems.push(event.message));"
    tell = "const tell = (value) => { document.title = JSON.stringify([value, problems]); };"
    last = f"<script>addEventListener('load', () => {{ {tell} {script} }});</script>"
    source = Path(page).read_text(encoding="utf-8")
    for mark, changed in (("<head>", f"<head><script>{listen}</script>"), ("</body>", f"{last}</body>")):
        assert source.count(mark) == 1
        source = source.replace(mark, changed)
    visited = Path(page).with_name(f"visited-{Path(page).name}")
    visited.write_text(source, encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    command += [f"--window-size={width_px},900", f"--user-data-dir={folder}", "--dump-dom", visited.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r"<title>(\[.*?)</title>", done.stdout, re.DOTALL)
    assert found, f"the page said nothing: {done.stderr[-2000:]}"
    return tuple(json.loads(html.unescape(found[1])))
