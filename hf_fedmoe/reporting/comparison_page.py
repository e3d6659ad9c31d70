"""A comparison as one HTML file, which can be sent around: the table, and the pictures in it."""

import base64
import html
import os
from collections.abc import Mapping
from pathlib import Path


PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font-family: system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: 0.3rem 0.8rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; white-space: normal; }}
img {{ max-width: 100%; }}
.wide {{ overflow-x: auto; }}
</style>
</head>
<body>
<h1>{title}</h1>
{parts}
</body>
</html>
"""


def write_comparison_page(
    path: str | os.PathLike, title: str, text: str, pictures: Mapping[str, str | os.PathLike]
) -> None:
    """
    Writes the page.

    Args:
        path (`str`): Of the file.
        title (`str`): Its heading.
        text (`str`): From [`comparison_table`], and paragraphs after it.
        pictures (`dict[str, str]`): By their headings, files that are there as PNG.
    """
    parts = [_part(each) for each in text.split("\n\n")]
    for heading, file in pictures.items():
        picture = base64.b64encode(Path(file).read_bytes()).decode()
        name = html.escape(heading)
        parts.append(f'<h2>{name}</h2>\n<img alt="{name}" src="data:image/png;base64,{picture}">')
    page = PAGE.format(title=html.escape(title), parts="\n".join(parts))
    Path(path).write_text(page, encoding="utf-8")


def _part(text: str) -> str:
    """A table or a paragraph of Markdown as HTML. What means something to HTML is numbers in a table's cells."""
    lines = text.split("\n")
    if not text.startswith("|"):
        return f"<p>{'<br>'.join(html.escape(line) for line in lines)}</p>"
    head, _, *rows = ([cell.strip() for cell in line[1:-1].split("|")] for line in lines)
    header = "".join(f"<th>{cell}</th>" for cell in head)
    body = "\n".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table>\n<tr>{header}</tr>\n{body}\n</table></div>'
