"""Builds HTML: every tag is closed, all text is escaped."""

import base64
import html
import re
from collections.abc import Iterable

GENERATOR = '<meta name="generator" content="python -m tools.report">'  # marks a page as written by this tool


class Html(str):
    """Markup; any other string is text, and is escaped."""


def element(tag: str, *content: object, **attributes: str) -> Html:
    """<tag …>content</tag>; attributes: `class_` is class, `aria_label` is aria-label; an empty one is left out."""
    names = {name: name.rstrip("_").replace("_", "-") for name in attributes}
    given = "".join(f' {names[name]}="{html.escape(value)}"' for name, value in attributes.items() if value)
    return Html(f"<{tag}{given}>{join(content)}</{tag}>")


def join(content: Iterable[object]) -> Html:
    return Html("".join(part if isinstance(part, Html) else html.escape(str(part)) for part in content))


def table(name: str, head: list[object], rows: Iterable[list[object]]) -> Html:
    """A table that scrolls sideways in its own box, and says so where it does (report.css).

    `rows`: the first value of each becomes its header, and every other that is not markup yet a cell.
    """
    columns = element("tr", *(element("th", title, scope="col") for title in head))
    body = []
    for first, *rest in rows:
        cells = (each if isinstance(each, Html) else td(each) for each in rest)
        body.append(element("tr", element("th", first, scope="row"), *cells))
    inner = element("table", element("thead", columns), element("tbody", *body))
    scroll = element("div", inner, class_="scroll", role="region", aria_label=name, tabindex="0")
    return element("div", scroll, class_="table")


def td(content: object, kind: str = "", title: str = "") -> Html:
    return element("td", content, class_=kind, title=title)


def path_cell(value: object, kind: str = "long") -> Html:
    """A cell whose lines may break anywhere, but better after a slash or an underscore, or before a point."""
    return td(Html(re.sub("(?<=[/_])|(?=[.])", "<wbr>", html.escape(str(value)))), kind)


def picture(renderings: dict[str, bytes], alt: str) -> Html:
    """`renderings`: an SVG for each media query, "" for the default."""
    uris = {query: f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}" for query, svg in renderings.items()}
    sources = "".join(f'<source media="{query}" srcset="{uri}">' for query, uri in uris.items() if query)
    return element("picture", Html(f'{sources}<img src="{uris[""]}" alt="{html.escape(alt)}">'))
