"""A report as one web page that needs nothing else, and its pictures as files beside it.

What a report says is plain values: sections of text, tables and pictures. Whoever has results makes
sections; this file knows how they look, on a phone or a screen, by day or by night.
"""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template

from PIL import Image

_PAGE = Path(__file__).with_suffix(".html")

# ------------------------------------------------------------------------------------- contents


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of text under a header; the first column names the rows."""

    header: Sequence[str]
    """One title per column; the first may be empty."""
    rows: Sequence[Sequence[str]]
    """As many texts each as the header."""
    caption: str = ""
    """Sentence on what the table shows."""

    def __post_init__(self) -> None:
        """Reject a ragged table."""
        for row in self.rows:
            if len(row) != len(self.header):
                raise ValueError(
                    f"table row {list(row)} must have as many texts as the header "
                    f"{list(self.header)}"
                )


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An image with a name and words to go with it."""

    name: str
    """Name of the file beside the report, without its ending."""
    image: Image.Image
    caption: str
    """Sentence on what there is to see; also read out to those who cannot."""
    scale: float = 1.0
    """Pixels on the page per pixel of the image, where there is room."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """One part of a report: its text, then its tables, then its pictures."""

    title: str
    text: str = ""
    """Plain text; an empty line begins a new paragraph."""
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()


@dataclass(frozen=True, kw_only=True)
class Highlight:
    """One number for those who read no further."""

    value: str
    label: str


# ----------------------------------------------------------------------------------------- page


def write_report(
    path: Path,
    sections: Sequence[Section],
    *,
    title: str,
    text: str = "",
    highlights: Sequence[Highlight] = (),
) -> list[Path]:
    """Write a page with everything inside it, and its pictures as PNG files in the same directory.

    Args:
        path: of the page; a file that is there is replaced, and so are pictures of the same name.
        sections: in order.
        title: of the page.
        text: before the first section, as in `Section.text`.
        highlights: shown large, below the text.

    Returns:
        Paths of the pictures, in order.

    Raises:
        ValueError: two pictures have the same name.
    """
    pictures = [picture for section in sections for picture in section.pictures]
    names = [picture.name for picture in pictures]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"picture names {repeated} must each be used once: they name files")
    path.parent.mkdir(parents=True, exist_ok=True)
    pngs = {picture.name: _png(picture.image) for picture in pictures}
    files = [path.with_name(f"{name}.png") for name in names]
    for file, png in zip(files, pngs.values(), strict=True):
        file.write_bytes(png)
    page = Template(_PAGE.read_text(encoding="utf-8")).substitute(
        title=html.escape(title),
        text=_paragraphs(text),
        highlights=_highlights(highlights),
        links=_links(sections),
        sections="\n".join(
            _section(number, section, pngs) for number, section in enumerate(sections)
        ),
    )
    path.write_text(page, encoding="utf-8", newline="\n")
    return files


def _section(number: int, section: Section, pngs: Mapping[str, bytes]) -> str:
    """One part of the page; `pngs` holds its pictures by name."""
    figures = "\n".join(_figure(picture, pngs[picture.name]) for picture in section.pictures)
    return "\n".join(
        [
            f'<section id="section-{number}">',
            f"<h2>{html.escape(section.title)}</h2>",
            _paragraphs(section.text),
            *map(_table, section.tables),
            f'<div class="figures">\n{figures}\n</div>' if figures else "",
            "</section>",
        ]
    )


def _paragraphs(text: str) -> str:
    """Plain text as paragraphs."""
    parts = [part.strip() for part in text.split("\n\n")]
    return "\n".join(f"<p>{html.escape(part)}</p>" for part in parts if part)


def _table(table: Table) -> str:
    """A table that scrolls sideways by itself where it is too wide."""
    caption = f"<caption>{html.escape(table.caption)}</caption>" if table.caption else ""
    header = "".join(
        f'<th scope="col"{_kind(text, _SHORT // 2)}>{html.escape(text)}</th>'
        for text in table.header
    )
    rows = [
        f'<tr><th scope="row">{html.escape(name)}</th>' + "".join(map(_cell, texts)) + "</tr>"
        for name, *texts in table.rows
    ]
    return "\n".join(
        [
            '<div class="table"><table>',
            caption,
            f"<thead><tr>{header}</tr></thead>",
            "<tbody>",
            *rows,
            "</tbody>",
            "</table></div>",
        ]
    )


def _cell(text: str) -> str:
    """A cell of a table; numbers and other short texts are never broken."""
    return f"<td{_kind(text, _SHORT)}>{html.escape(text)}</td>"


def _kind(text: str, most: int) -> str:
    """The attribute of a cell whose text stays on one line, if it is no longer than this."""
    return ' class="short"' if len(text) <= most else ""


def _figure(picture: Picture, png: bytes) -> str:
    """A picture inside the page, at most as wide as the page."""
    data = base64.b64encode(png).decode("ascii")
    caption = html.escape(picture.caption)
    width, height = (round(picture.scale * side) for side in picture.image.size)
    # Small pictures are shown larger where there is room, up to their own pixels.
    frame = f"flex: 1 1 {width}px; max-width: min(100%, {max(width, picture.image.width)}px)"
    least = f"min-width: min({width}px, {_READABLE}px)"
    return (
        f'<figure style="{frame}"><div class="scroll"><img style="{least}" '
        f'src="data:image/png;base64,{data}" width="{width}" height="{height}" alt="{caption}">'
        f"</div><figcaption>{caption}</figcaption></figure>"
    )


def _highlights(highlights: Sequence[Highlight]) -> str:
    """Numbers in large type, with what they are below."""
    if not highlights:
        return ""
    tiles = "\n".join(
        f"<div><dt>{html.escape(highlight.label)}</dt><dd>{html.escape(highlight.value)}</dd></div>"
        for highlight in highlights
    )
    return f'<dl class="highlights">\n{tiles}\n</dl>'


def _links(sections: Sequence[Section]) -> str:
    """Where to jump to."""
    links = [
        f'<a href="#section-{number}">{html.escape(section.title)}</a>'
        for number, section in enumerate(sections)
    ]
    return f"<nav>{' '.join(links)}</nav>" if len(links) > 1 else ""


def _png(image: Image.Image) -> bytes:
    """An image as the bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


_SHORT = 24
"""Most characters of a text in a table that is kept on one line."""
_READABLE = 520
"""Pixels that a picture has at least, however narrow the screen: the rest is reached by scrolling
sideways, where shrinking it would leave letters that nobody can read."""
