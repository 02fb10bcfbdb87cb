"""Make the pictures of the report in docs/img from a run folder: `python docs/make_screenshots.py RUN`.

It needs Chromium. The folder's report is written anew; pictures of what the folder doesn't hold (`validation.json`)
are left as they are.
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
DESKTOP, PHONE = (1280, 900), (390, 844)


def main(run: Path, out: Path = IMG) -> None:
    """Write every picture that the run folder has something for."""
    page = write_report(run).resolve().as_uri()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile, Browser(Path(profile)) as browser:

        def shot(name: str, size: tuple[int, int], *, dark: bool = False, part: str = "", click: str = "") -> None:
            browser.call("Page.navigate", {"url": "about:blank"})
            browser.open(page, width=size[0], height=size[1], dark=dark)
            browser.settle()
            for element in filter(None, (part, click)):
                if not browser.run(f"!!document.querySelector({element!r})"):
                    print(f"{name}: nothing to show, left as it is")
                    return
            if part:
                browser.run(f"document.querySelector({part!r}).scrollIntoView(); scrollBy(0, -70)")
            if click:
                browser.run(f"document.querySelector({click!r}).click()")
            browser.settle()
            browser.screenshot(out / f"{name}.png")
            print(out / f"{name}.png")

        tall = (1280, 1760)
        shot("report-desktop-light", tall)
        shot("report-desktop-dark", tall, dark=True)
        shot("report-phone-light", (390, 1500))
        shot("report-chosen-desktop-light", (1280, 1100), part="[aria-labelledby=h-method]")
        shot("report-truth-desktop-light", (1280, 700), part="[aria-labelledby=h-truth]")
        shot("report-drawer-desktop-dark", DESKTOP, dark=True, click=".kept-side .card")
        shot("report-drawer-phone-dark", PHONE, dark=True, click=".kept-side .card")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
