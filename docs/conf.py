"""Sphinx settings of the website. `docs/build.py` prepares the sources and the served libraries."""

project = html_title = "Skylar"
author = "Skylar"
copyright = "Skylar's authors, Apache-2.0"

extensions = ["myst_nb", "sphinxcontrib.mermaid", "sphinx_copybutton"]
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist"]
myst_fence_as_directive = ["mermaid"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # an output may hold a heading of any level

exclude_patterns = ["_build"]
nb_execution_mode = "off"  # the notebooks are stored executed
nb_render_markdown_format = "myst"  # tables, maths and links in outputs as in the text
nb_code_prompt_show = "Show the code"
nb_code_prompt_hide = "Hide the code"
nb_ipywidgets_js = {}
copybutton_selector = "div.highlight pre"

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["skylar.css"]
html_favicon = "_static/favicon.svg"  # a causal mask
html_show_sphinx = False
html_copy_source = False
pygments_style = "default"
pygments_dark_style = "github-dark"

# served by the site itself: it works without a network
mathjax_path = "vendor/mathjax/tex-mml-chtml.js"
mermaid_use_local = "vendor/mermaid/mermaid.esm.min.mjs"
mermaid_height, mermaid_fullscreen = "auto", False
