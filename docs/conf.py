"""How Sphinx makes a site of the Markdown pages, which the repository's own web page shows as well.

sphinx-build -W -c docs . build/docs
"""

import re

project = "easyrm"
author = copyright = "The easyrm authors"
extensions = ["myst_parser"]
myst_heading_anchors = 3
root_doc = "docs/index"
include_patterns = ["README.md", "docs/*.md", "tpu_launch/README.md"]  # the root is the repository: links leave docs/
exclude_patterns = [".*", "build", "benchmarks", "demo", "demo_run", "easyrm", "tests"]  # are not even looked through
html_theme = "furo"
html_title = project
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["site.css"]


def _add_contents(_, name: str, source: list[str]) -> None:
    """The pages in the order of the first page's links, for its text is a plain list on the repository's page."""
    if name == root_doc:
        pages = dict.fromkeys(re.findall(r"\]\(([\w./-]+)\.md\)", source[0]))
        source[0] += "\n```{toctree}\n:hidden:\n\n" + "\n".join(pages) + "\n```\n"


def setup(app) -> None:
    """Called by Sphinx."""
    app.connect("source-read", _add_contents)
