"""Links to folders of the repository, and to Markdown that is no page of the site: shown without a link."""

from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform


class RepositoryLinks(SphinxPostTransform):
    """Takes such links away; those to what does not exist are left for the build to complain about."""

    default_priority = 5  # before MyST resolves its links

    def run(self, **kwargs: Any) -> None:
        folder = Path(self.env.doc2path(self.env.docname)).parent
        for node in list(self.document.findall(addnodes.pending_xref)):
            target = node.get("reftarget", "")
            if node.get("refdomain") == "doc":
                no_page = target not in self.env.all_docs and Path(self.env.srcdir, f"{target}.md").exists()
            else:
                no_page = (folder / target).is_dir()
            if no_page:
                node.replace_self(nodes.inline("", "", *node.children))


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_post_transform(RepositoryLinks)
    return {"parallel_read_safe": True}
