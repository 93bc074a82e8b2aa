"""Settings of the documentation site: `make docs` builds it with Sphinx into `site/`."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import molf  # noqa: E402
from docs_site.pages import complete_page  # noqa: E402

project = "molf"
author = "The molf authors"
version = release = molf.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["*.template.md"]

# Links between headings are those of GitHub, so that the pages work in both places.
myst_heading_anchors = 4
myst_enable_extensions = ["deflist"]
suppress_warnings = ["myst.header"]  # generated option lists start below the first level

default_role = "code"  # docstrings have names in single backticks
autodoc_typehints = "signature"
autodoc_preserve_defaults = True  # as written: `print`, not its representation
toc_object_entries_show_parents = "hide"
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # dataclasses have the same names as members

html_theme = "furo"  # needs no fonts or scripts of other servers
html_title = "molf"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
html_show_copyright = False
pygments_style = "default"
pygments_dark_style = "monokai"


def setup(app):
    """Complete pages and signatures when Sphinx reads them."""

    def read(app, name, content):
        content[0] = complete_page(content[0], Path(app.srcdir) / f"{name}.md")

    def sign(app, what, name, value, options, signature, returned):
        # The default of a field of a dataclass is no expression.
        return signature and signature.replace("<factory>", "..."), returned

    app.connect("source-read", read)
    app.connect("autodoc-process-signature", sign)
