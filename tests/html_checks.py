"""What every page of the report room has to be: well-formed, self-contained, without scripts."""

from __future__ import annotations

import re
from html.parser import HTMLParser

VOID = {"meta", "img", "br", "hr", "link", "input"}


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.resources: list[str] = []
        self.used: list[str] = []
        self.text: list[str] = []

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._element(tag, attrs)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._element(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def _element(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            assert not name.startswith("on"), f"a script hides in {name}"
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "srcset", "data", "poster", "href", "xlink:href") and tag != "a":
                (self.used if (value or "").startswith("#") else self.resources).append(value or "")
            self.used += re.findall(r"url\((#[^)]*)\)", value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text.append(data)


def check_page(html: str, plots: int = 1) -> str:
    """Asserts the rules; returns the page's text, spaces collapsed.

    Args:
        plots: the least number of plots.
    """
    reader = _Reader()
    reader.feed(html)
    reader.close()
    assert reader.open == [], f"never closed: {reader.open}"
    assert {"script", "link", "iframe", "object", "base"}.isdisjoint(reader.tags)
    assert [r[:60] for r in reader.resources if not r.startswith("data:image/png;base64,")] == []
    assert "@import" not in html
    assert re.findall(r"url\(\s*['\"]?(?!#)", html) == []
    assert len(reader.ids) == len(set(reader.ids)), "one id, one element, over all plots"
    assert {u[1:] for u in reader.used} <= set(reader.ids)
    assert reader.tags.count("svg") >= plots
    for stand_in in re.findall(r"#0[147a]0[258b]0[369c]|#a1b2\w\w", html):
        raise AssertionError(f"the stand-in colour {stand_in} was not replaced")
    return " ".join(" ".join(reader.text).split())
