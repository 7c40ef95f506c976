"""The site: ``make docs`` builds it into docs/_build/html, offline; nothing on a page is fetched when it is read."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

import fewstep

project = "fewstep"
author = "the fewstep authors"
project_copyright = author
version = release = fewstep.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "mathml",
    "generated",
    "offline",
]
exclude_patterns = ["_build", "_ext", "**.ipynb_checkpoints"]
source_suffix = {".md": "myst-nb", ".rst": "restructuredtext", ".ipynb": "myst-nb"}
nb_execution_mode = "off"  # their outputs are stored with them
nb_render_markdown_format = "myst"  # tables that a cell makes
myst_enable_extensions = ["attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_dmath_double_inline = True
myst_heading_anchors = 4

autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80
add_module_names = False
napoleon_use_ivar = True
napoleon_use_rtype = False
# What the pages refer to and other projects document: nothing is fetched to link it.
nitpick_ignore_regex = [(r"py:.*", r"(?!fewstep\b).*"), (r"py:.*", r"fewstep\.\w+\..*")]

html_math_renderer = "mathml"
html_theme = "furo"
html_title = f"fewstep {version}"
html_static_path = ["_static"]
html_css_files = ["fewstep.css"]
html_favicon = "_static/favicon.svg"
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#1f5fbf", "color-brand-content": "#1f5fbf"},
    "dark_css_variables": {"color-brand-primary": "#7fb2ff", "color-brand-content": "#7fb2ff"},
}
pygments_style = "default"
pygments_dark_style = "github-dark"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
