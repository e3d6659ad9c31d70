"""Settings of the site (`make docs`). Pages lie where GitHub shows them: the repository is the source folder."""

import sys
from pathlib import Path


SITE = Path(__file__).parent
sys.path[:0] = [str(SITE), str(SITE.parents[1])]

import hf_fedmoe  # noqa: E402  # after the path that finds it


project = "hf_fedmoe"
release = version = hf_fedmoe.__version__
author = copyright = "The authors of hf_fedmoe"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "hugging_face_docstrings",
    "front_door",
    "repository_links",
    "llms_txt",
]
include_patterns = [
    "docs/*.md",
    "docs/notebooks/*.md",
    "docs/reference/*.md",
    "benchmarks/README.md",
    "recipes/paper/README.md",
    "*.md",
]
root_doc = "docs/index"

# Links to headings are those of GitHub. Two pages are written by others and may be there or not.
myst_heading_anchors = 4
suppress_warnings = ["toctree.empty_glob"]

# A notebook that fails fails the build. Each runs in a folder of its own.
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_execution_in_temp = True
nb_execution_timeout = 600
nb_merge_streams = True
nb_render_markdown_format = "myst"  # which has tables
nb_output_stderr = "remove"  # bars of progress; what fails is raised

# Types stand in the docstrings.
autodoc_typehints = "none"
autodoc_member_order = "bysource"
python_use_unqualified_type_names = True

# Nothing is fetched: no fonts, no inventories of other sites, no scripts of notebooks' widgets.
nb_ipywidgets_js: dict = {}
html_theme = "furo"
html_title = f"hf_fedmoe {version}"
html_copy_source = html_show_sourcelink = html_show_sphinx = html_show_copyright = False
templates_path = ["."]
html_static_path = ["static"]
html_css_files = ["site.css"]
# The first page is in a folder, as in the repository: who asks for the site is sent there.
html_additional_pages = {"index": "redirect.html"}
