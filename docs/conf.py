"""How the documentation is built: ``sphinx-build -W -n -b html docs <where>``."""

from __future__ import annotations

import inspect
import os
import re
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, os.path.abspath(".."))
sys.path.insert(1, os.path.abspath("."))

from pygments.lexers.shell import BashLexer

import trio_unixconn
import trio_unixconn.jupyter
import trio_unixconn.pool
import trio_unixconn.testing

if TYPE_CHECKING:
    from collections.abc import Callable

    from docutils.nodes import Element
    from sphinx.addnodes import pending_xref
    from sphinx.application import Sphinx
    from sphinx.environment import BuildEnvironment

project = "trio_unixconn"
author = "The trio_unixconn developers"
copyright = author
version = release = trio_unixconn.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinxcontrib_trio",
    "drawing",
]
nitpicky = True
nitpick_ignore = [
    # A type variable.
    ("py:class", "trio_unixconn.handover._listeners.StreamT"),
]
html_theme = "furo"
html_title = "trio_unixconn"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_theme_options = {
    # Orange and grey differ in lightness too: visible in print, and to the colour-blind.
    "light_css_variables": {"ours": "#d98200", "dead": "#c0392b"},
    "dark_css_variables": {"ours": "#f0a830", "dead": "#ff7b6b"},
}
pygments_style = "default"
pygments_dark_style = "monokai"
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
# The notebooks are shown with the outputs that they are kept with: nox -s notebooks runs them.
nb_execution_mode = "off"
exclude_patterns = ["_build", "**/.ipynb_checkpoints"]
autodoc_member_order = "bysource"

# Objects of these classes come from the library, so how they are made is not shown.
_MADE_BY_THE_LIBRARY = {
    f"trio_unixconn.{name}"
    for name in (
        "pool.AbandonedJob",
        "pool.Job",
        "pool.JobReceipt",
        "pool.PoolStatistics",
        "pool.WorkerPool",
        "pool.WorkerInfo",
        "pool.WorkerServer",
        "pool.WorkerStatistics",
        "testing.FakeServiceManager",
        "AsyncResult",
        "CallbackAdapter",
        "CallbackConnection",
        "CancellableScope",
        "DescriptorStream",
        "PeerIdentity",
        "UnixServer",
    )
}
_OTHER_PROJECTS = (
    "anyio.",
    "httpcore.",
    "trio.",
    "collections.abc.",
    "contextlib.",
    "enum.",
    "IOBase",
    "os.",
    "socket.",
    "stdlib_socket.",
)


def _copy_notebooks() -> None:
    """Copy the notebooks to a directory below this one, where Sphinx looks for pages."""
    here = Path(__file__).parent
    (here / "notebooks").mkdir(exist_ok=True)
    for source in (here.parent / "examples" / "notebooks").glob("*.ipynb"):
        copy = here / "notebooks" / source.name
        # A page is built again if its file is newer than before.
        if not copy.exists() or copy.read_bytes() != source.read_bytes():
            shutil.copyfile(source, copy)


# In signatures, what is shown in place of what Python shows.
_IN_ARGUMENTS: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
    (r"<(\w+\.\w+): \d+>", r"\1"),
    (r"= inf\b", "= math.inf"),
    (r"= NOTHING\b", "= ..."),
    (r"\bmode: int = (\d+)", lambda found: f"mode: int = {int(found[1]):#o}"),
    (r"str \| bytes \| PathLike\[str\] \| PathLike\[bytes\] \| UnixSocketAddress", "AddressLike"),
    # A protocol for a module in a layer below that of the class.
    (r"\bAnyGeneration\b", "Generation"),
]


def _name_defining_modules() -> None:
    """Make each public class name the file that defines it, as it did before it was exported.

    Autodoc reads the order of its methods, and their overloads, in the module that it names.
    """
    for module in [each for key, each in sys.modules.items() if key.startswith("trio_unixconn")]:
        source = inspect.getsource(module)
        for name, value in vars(module).items():
            if inspect.isclass(value) and re.search(rf"^class {name}\b", source, re.MULTILINE):
                value.__module__ = module.__name__


_name_defining_modules()
_copy_notebooks()


def _show_signature(
    _app: Sphinx, _what: str, name: str, _obj: object, _options: object, *signature: str | None
) -> tuple[str | None, str | None]:
    """Hide the constructors above, and show defaults as they are written in Python."""
    if name in _MADE_BY_THE_LIBRARY:
        return "", None
    arguments, returned = signature
    for pattern, shown in _IN_ARGUMENTS:
        arguments = arguments and re.sub(pattern, shown, arguments)
    # Of a function that is decorated with contextmanager or asynccontextmanager.
    context = re.fullmatch(r"(?:Async)?Generator\[(\w+), None(?:, None)?\]", returned or "")
    return arguments, context[1] if context else returned


def _read_as_prose(
    _app: Sphinx, what: str, _name: str, _obj: object, _options: object, lines: list[str]
) -> None:
    """Keep napoleon from taking words before a colon for a type or for an exception."""
    returned = what == "attribute"
    for number, line in enumerate(lines):
        if returned:
            lines[number] = line.replace(": ", " \N{EN DASH} ", 1)
        returned = line.strip() == "Returns:"
        if line.strip().startswith("All that :meth:"):
            lines[number : number + 1] = ["", "It also raises a" + line.strip()[1:], ""]


def _leave_as_text(
    _app: Sphinx, _env: BuildEnvironment, node: pending_xref, text: Element
) -> Element | None:
    """Show the names of other projects without a link: the build fetches no inventories."""
    return text if node.get("reftarget", "").startswith(_OTHER_PROJECTS) else None


def _look_in_the_package(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, text: Element
) -> Element | None:
    """Find what one module of the package calls by the name that another one gives it."""
    if node.get("refdomain") != "py":
        return None
    python, target = env.domains.python_domain, node.get("reftarget", "")
    # Types in signatures (reference/types.md) are classes to autodoc.
    for name, kind in [
        *(
            (f"trio_unixconn.{module}{target}", node["reftype"])
            for module in ("", "pool.", "handover.")
        ),
        (f"trio_unixconn.{target}", "data"),
    ]:
        found = python.resolve_xref(env, node["refdoc"], app.builder, kind, name, node, text)
        if found is not None:
            return found
    return None


def _mark_fragments(_app: Sphinx, _name: str, content: list[str]) -> None:
    """Show what a block is: a fragment, a file or an output; see tests/docs/pages.py."""
    captions = {"a part of": r"A part of `\2`", "not run:": "A fragment, not a complete program"}

    def captioned(match: re.Match[str]) -> str:
        caption = match.expand(captions[match[1]])
        return f"```{{code-block}} python\n:caption: {caption}\n"

    pattern = r"<!-- (a part of|not run:) ([^>]*?) -->\n```python\n"
    content[0] = re.sub(pattern, captioned, content[0])
    pattern = r"(```\{literalinclude\} (?:\.\./)+(examples/\S+)\n)"
    content[0] = re.sub(pattern, r"\1:caption: \2\n", content[0])
    pattern = r"( *)<!-- output[^>]*? -->\n\1```text\n"
    content[0] = re.sub(pattern, r"\1```{code-block} text\n\1:class: output\n\n", content[0])


def _break_code(
    _app: Sphinx, _page: str, _template: str, context: dict[str, Any], _doctree: object
) -> None:
    """Let code in a table break after its points and the like, and an option nowhere."""

    def broken(cell: re.Match[str]) -> str:
        return re.sub(
            r'(<span class="pre">)([^<]*)',
            lambda code: code[1] + re.sub(r"(?<=\w)([._/(,=-]+)(?=\w)", r"\1<wbr />", code[2]),
            cell[0],
        )

    if "body" in context:
        body = re.sub(r"<t([hd])\b.*?</t\1>", broken, context["body"], flags=re.DOTALL)
        context["body"] = re.sub(r'<span class="pre">(?=-)', '<span class="pre option">', body)


def setup(app: Sphinx) -> None:
    """Connect the functions above."""
    # Commands without a prompt; the lexer of that name takes them for output.
    app.add_lexer("console", BashLexer)
    app.connect("source-read", _mark_fragments)
    app.connect("html-page-context", _break_code)
    app.connect("autodoc-process-signature", _show_signature)
    app.connect("autodoc-process-docstring", _read_as_prose, priority=400)
    app.connect("missing-reference", _leave_as_text)
    app.connect("missing-reference", _look_in_the_package)
