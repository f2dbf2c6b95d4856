"""HTML whose tags are closed and whose text is escaped."""

import base64
import html
from collections.abc import Iterable

GENERATOR = '<meta name="generator" content="python -m tools.report">'  # marks a page as written by this tool


class Html(str):
    """Markup; every other string is escaped on its way into the page."""


def element(tag: str, *content: object, **attributes: str) -> Html:
    """<tag …>content</tag>; `class_` stands for class, and an underscore within a name for a hyphen."""
    names = {name: name.rstrip("_").replace("_", "-") for name in attributes}
    given = "".join(f' {names[name]}="{html.escape(value)}"' for name, value in attributes.items() if value)
    return Html(f"<{tag}{given}>{join(content)}</{tag}>")


def join(content: Iterable[object]) -> Html:
    return Html("".join(part if isinstance(part, Html) else html.escape(str(part)) for part in content))


def table(name: str, head: list[object], rows: Iterable[list[object]]) -> Html:
    """A table that scrolls in its own box; the first cell of a row heads it, and one that is no cell yet becomes it."""
    columns = element("tr", *(element("th", title, scope="col") for title in head))
    body = []
    for first, *rest in rows:
        cells = (each if isinstance(each, Html) else td(each) for each in rest)
        body.append(element("tr", element("th", first, scope="row"), *cells))
    inner = element("table", element("thead", columns), element("tbody", *body))
    return element("div", inner, class_="scroll", role="region", aria_label=name, tabindex="0")


def td(content: object, kind: str = "", title: str = "") -> Html:
    return element("td", content, class_=kind, title=title)


def path_cell(value: object) -> Html:
    """A cell whose text may go on in a new line, rather after a slash than within a name."""
    return td(Html(html.escape(str(value)).replace("/", "/<wbr>")), "long")


def picture(renderings: dict[str, bytes], alt: str) -> Html:
    """SVGs by the media query that asks for each; the one by "" is for all others."""
    uris = {query: f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}" for query, svg in renderings.items()}
    sources = "".join(f'<source media="{query}" srcset="{uri}">' for query, uri in uris.items() if query)
    return element("picture", Html(f'{sources}<img src="{uris[""]}" alt="{html.escape(alt)}">'))
