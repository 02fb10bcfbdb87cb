"""Make the pictures of the report in docs/img from a run folder: `python docs/make_screenshots.py RUN`.

It needs Chromium. The folder's report is written anew; pictures of what the folder doesn't hold (`keepset
validate`, `keepset report --why`) are left as they are.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from keepset.report import write_report

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from chromium import Browser  # noqa: E402

IMG = ROOT / "docs/img"


def main(run: Path, out: Path = IMG) -> None:
    """Write every picture that the run folder has something for."""
    page = write_report(run).resolve().as_uri()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile, Browser(Path(profile)) as browser:

        def shot(name: str, size: tuple[int, int], do: str = "true", *, dark: bool = False, at: str = "") -> None:
            browser.call("Page.navigate", {"url": "about:blank"})
            browser.open(page + at, width=size[0], height=size[1], dark=dark)
            browser.settle()
            if not browser.run(do):
                print(f"{name}: nothing to show, left as it is")
                return
            browser.settle()
            browser.screenshot(out / f"{name}.png")
            print(out / f"{name}.png")

        def part(name: str) -> str:
            found = f"document.querySelector('[aria-labelledby={name}]')"
            return f"(() => {{ const e = {found}; if (e) {{ e.scrollIntoView(); scrollBy(0, -70); }} return !!e; }})()"

        card = "(() => { document.querySelector('.kept-side .card').click(); return true; })()"
        tokens = (
            "(() => { const e = document.getElementById('method'); if (e) { e.value = 'davir';"
            " e.dispatchEvent(new Event('change')); } document.querySelector('#rowtable tbody tr').click();"
            " return !!document.querySelector('.tokens'); })()"
        )
        shot("report-desktop-light", (1280, 1760))
        shot("report-desktop-dark", (1280, 1760), dark=True)
        shot("report-phone-light", (390, 1500))
        shot("report-chosen-desktop-light", (1280, 1100), part("h-method"))
        shot("report-truth-desktop-light", (1280, 700), part("h-truth"))
        shot("report-drawer-desktop-dark", (1280, 900), card, dark=True)
        shot("report-drawer-phone-dark", (390, 844), card, dark=True)
        shot("report-tokens-desktop-light", (1280, 900), tokens, at="#rows")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
