"""Pages of the site that are written elsewhere: documents at the top, examples, the reference.

`mkdocs` calls the functions named `on_..`; see mkdocs.yml.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
TOP = ("CHANGELOG", "CONTRIBUTING", "SECURITY", "THIRD_PARTY")
"""Documents beside the README that are pages."""


def on_files(files: Files, config: Any) -> Files:
    """Add pages to those of docs/."""
    pages = {f"{name.lower()}.md": (ROOT / f"{name}.md").read_text("utf-8") for name in TOP}
    notebooks = [
        path for path in (ROOT / "examples").glob("*.py") if "# %%" in path.read_text("utf-8")
    ]
    for path in notebooks:
        pages[f"examples/{path.stem}.md"] = of_example(path)
    for room in (path for path in (ROOT / "mergevq").iterdir() if (path / "__init__.py").is_file()):
        pages[f"reference/{room.name}.md"] = of_room(room)
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, files: Files, **_: Any) -> str:
    """Lead links that leave docs/ to pages of what they name; other files stay text."""
    depth = page.file.src_uri.count("/")
    is_of_top = page.file.src_uri in {f"{name.lower()}.md" for name in TOP}

    def led(link: re.Match[str]) -> str:
        text, name, heading = link[1], link[2], link[3] or ""
        place = (ROOT / ("" if is_of_top else "docs") / name).resolve()
        if not place.is_relative_to(ROOT):
            return text
        path = place.relative_to(ROOT).as_posix()
        for each in (path.removeprefix("docs/"), path.lower(), f"{path.removesuffix('.py')}.md"):
            if files.get_file_from_path(each) is not None:
                return f"[{text}]({'../' * depth}{each}{heading})"
        return text

    return re.sub(r"(?<!!)\[([^\]]*)\]\(((?!https?://|#)[^)\s#]+)(#[^)\s]*)?\)", led, markdown)


def of_example(path: Path) -> str:
    """A notebook in percent format as Markdown."""
    parts = []
    for cell in re.split(r"(?m)^# %%", path.read_text("utf-8"))[1:]:
        kind, _, body = cell.partition("\n")
        if kind.strip() == "[markdown]":
            parts.append(re.sub(r"(?m)^# ?", "", body).strip())
        else:
            parts.append(f"```python\n{body.strip()}\n```")
    return "\n\n".join([*parts, f"The file is `examples/{path.name}`."])


def of_room(room: Path) -> str:
    """The docstrings of all modules of a room."""
    modules = sorted(
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in room.rglob("*.py")
    )
    return "\n\n".join([f"# {room.name}", *(f"::: {module}" for module in modules)])
