"""The layer map of the design holds: imports point down only."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import trio_unixconn
from tests._helpers.processes import ROOT

PACKAGE = Path(trio_unixconn.__file__).parent

# From the top to the bottom; a module may import those below it. The modules of a subpackage
# share one layer; their own order is in PACKAGES.
LAYERS = [
    "__init__",
    "__main__",
    "_cli",
    "testing",
    "jupyter",
    "asgi",
    "pool",
    "handover",
    "anyio",
    "httpcore",
    "systemd",
    "_server",
    "_listener",
    "_client",
    "_datagram",
    "_policy",
    "_accept",
    "_callbacks",
    "_callback_connection",
    "_results",
    "_connection",
    "_receiver",
    "_processor",
    "_sender",
    "_socket",
    "_messages",
    "_readahead",
    "_ancillary",
    "_sockopts",
    "_fds",
    "_memfd",
    "_identity",
    "_fdlist",
    "_fdtypes",
    "_file_thread",
    "_cancellable",
    "_bind",
    "_paths",
    "_address",
    "_credentials",
    "_ucred",
    "_kernel",
    "_frames",
    "_closing",
    "_guards",
    "_buffers",
    "_owner",
    "errors",
    "_trio_task",
    "_public",
    "_version",
]
PACKAGES = {
    "_cli": [
        "demo.command",
        "demo.tables",
        "demo.driver",
        "demo.worker",
        "demo.wire",
        "demo.__init__",
        "doctor.command",
        "doctor.tables",
        "doctor.examination",
        "doctor.probes",
        "doctor.limits",
        "doctor.lab",
        "doctor.report",
        "doctor.__init__",
        "passing",
        "peer",
        "upgrade",
        "serve.command",
        "serve.asgi",
        "serve.service",
        "serve.upgrades",
        "serve.binds",
        "serve.reload",
        "serve.table",
        "serve.status",
        "serve.notify",
        "serve.log",
        "serve.output",
        "serve.children",
        "serve.directory",
        "serve.pid_file",
        "serve.__init__",
        "_activation",
        "_console",
        "__init__",
    ],
    "pool": [
        "_bootstrap",
        "__init__",
        "_template",
        "_worker",
        "_accepting",
        "_job",
        "_stats_server",
        "_agent_check",
        "_health",
        "_exchanges",
        "_server",
        "_pool",
        "_supervisor",
        "_queue",
        "_handle",
        "_preload",
        "_process",
        "_accepted",
        "_accept_log",
        "_completion_log",
        "_pending",
        "_endpoints",
        "_config",
        "_worker_config",
        "_cpus",
        "_proxy_header",
        "_statistics",
        "_import_string",
        "_protocol",
    ],
    "handover": [
        "__init__",
        "_haproxy",
        "_generation",
        "_serving",
        "_predecessor",
        "_passing",
        "_giver",
        "_taker",
        "_spawn",
        "_processor",
        "_listeners",
        "_channel",
        "_manifest",
        "_protocol",
    ],
    "asgi": ["__init__", "_server", "_worker", "_hypercorn", "_application"],
    "testing": ["plugin", "__init__", "_service_manager", "_paths", "_pairs", "_descriptors"],
}


def modules() -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        found[".".join(path.relative_to(PACKAGE).with_suffix("").parts)] = path
    return found


def imports_of(name: str, path: Path) -> set[str]:
    """Return the modules of the package that a module imports, by name."""
    package = name.split(".")[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "trio_unixconn":
                    found.add(alias.name.removeprefix("trio_unixconn").lstrip(".") or "__init__")
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                base = package[: len(package) - node.level + 1]
            elif node.module and node.module.split(".")[0] == "trio_unixconn":
                base = []
                node.module = node.module.removeprefix("trio_unixconn").lstrip(".") or None
            else:
                continue
            if node.module:
                found.add(".".join([*base, node.module]))
            else:
                for alias in node.names:
                    target = [*base, alias.name]
                    there = PACKAGE.joinpath(*target)
                    is_module = there.with_suffix(".py").exists() or there.is_dir()
                    found.add(".".join(target) if is_module else ".".join([*base, "__init__"]))
    return found


def rank(name: str) -> tuple[int, int]:
    layer, _, file = name.partition(".")
    if layer not in PACKAGES:
        return LAYERS.index(layer), 0
    files = PACKAGES[layer]
    is_package = file not in files
    return LAYERS.index(layer), files.index(f"{file}.__init__".lstrip(".") if is_package else file)


def test_every_module_is_on_the_map() -> None:
    """Every module is in LAYERS or PACKAGES, and every entry is a module."""
    names = modules()
    assert {name.partition(".")[0] for name in names} == set(LAYERS)
    for package, files in PACKAGES.items():
        assert {n.partition(".")[2] for n in names if n.startswith(f"{package}.")} == set(files)


def test_imports_point_down() -> None:
    """A module imports only those below it, even in TYPE_CHECKING blocks and functions."""
    upward = [
        f"{name} imports {imported}"
        for name, path in modules().items()
        for imported in imports_of(name, path)
        if rank(imported) <= rank(name)
    ]
    assert upward == []


def test_no_module_imports_the_package_root() -> None:
    """No module imports trio_unixconn itself, which would make a circle."""
    assert [name for name, path in modules().items() if "__init__" in imports_of(name, path)] == []


def test_an_upward_import_would_be_seen(tmp_path: Path) -> None:
    """The check itself can fail: it sees every form of import."""
    module = tmp_path / "_kernel.py"
    module.write_text(
        "from ._connection import UnixConnection\nfrom . import _ancillary\n"
        "import trio_unixconn._listener\nfrom trio_unixconn import errors\n"
        "from . import connection_pair\nimport os\nfrom pathlib import Path\n"
    )
    assert imports_of("_kernel", module) == {
        "_connection",
        "_ancillary",
        "_listener",
        "errors",
        "__init__",
    }


def test_only_sender_calls_sendmsg_and_only_receiver_recvmsg() -> None:
    """Only _sender calls sendmsg, and only _receiver recvmsg.

    The exception is the doctor's lab, which probes the kernel.
    """
    callers = {
        (name, node.attr)
        for name, path in modules().items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in {"sendmsg", "recvmsg", "recvmsg_into"}
    }
    lab = {("_cli.doctor.lab", "sendmsg"), ("_cli.doctor.lab", "recvmsg")}
    assert callers - lab == {
        ("_sender", "sendmsg"),
        ("_receiver", "recvmsg"),
        ("_receiver", "recvmsg_into"),
    }


def test_map_names_files_that_exist() -> None:
    """Every file and module that the map of the code names is there."""
    root = Path(__file__).parents[1]
    text = (root / "docs" / "explanation" / "map.md").read_text()
    names = set(re.findall(r"`([\w/]+\.\w+|(?:pool/)?_[a-z]+)`", text))
    assert len(names) > 20
    there = {
        name
        for name in names
        for path in (PACKAGE / name, PACKAGE / f"{name}.py", root / name)
        if path.is_file()
    }
    assert names - there == set()


# Private names of other projects, which have no public way to the same.
FOREIGN_PRIVATE = {
    ("_accept", "_accept"),  # of socket.socket: without a socket object for each connection
    ("_sockopts", "_sock"),  # of trio's sockets
    ("asgi._hypercorn", "_flush"),  # of hypercorn's HTTP/2
    ("asgi._hypercorn", "_send_error_response"),  # of hypercorn's HTTP/1.1
    ("pool._process", "_args_from_interpreter_flags"),  # of subprocess
    ("pool._process", "_xoptions"),  # of sys, documented
    ("pool._worker", "_exit"),  # of os, documented
}


def private_names(text: str) -> set[str]:
    """Return the private names that a module uses and does not define."""
    defined: set[str] = set()
    used: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                defined.add(node.name)
            case ast.Name(ctx=ast.Store()):
                defined.add(node.id)
            case ast.Attribute(ctx=ast.Store()):
                defined.add(node.attr)
            case ast.Attribute():
                used.add(node.attr)
            case ast.Call(func=ast.Name(id="getattr"), args=[_, ast.Constant(value=str(name)), *_]):
                used.add(name)
            case ast.ImportFrom(module=str()):
                used.update(alias.name for alias in node.names)
    # _replace() and its like are the public methods of named tuples.
    public = {"_replace", "_asdict", "_make", "_fields"}
    return {name for name in used - defined - public if re.match(r"_(?!_)", name)}


def test_private_names_stay_in_their_file() -> None:
    """A private name is used only in the file that defines it; a file's own classes are its own."""
    used = {
        (name, key) for name, path in modules().items() for key in private_names(path.read_text())
    }
    assert used == FOREIGN_PRIVATE


def test_a_private_name_of_another_file_would_be_seen() -> None:
    """The check itself can fail: it sees attributes, imports and getattr."""
    text = "from ._a import _b\nfrom . import _c\nx._d\ngetattr(x, '_e')\nself._f = self._f\n"
    assert private_names(text) == {"_b", "_d", "_e"}


def test_design_describes_each_layer() -> None:
    """The table of layers in the design has a row for each layer, and for each module of pool."""
    text = (ROOT / "docs" / "explanation" / "design.md").read_text()
    table = text.partition("## Layers")[2].partition("Why it is divided")[0]
    named = set(re.findall(r"`([^`]+)`", "".join(re.findall(r"(?m)^\| (.*?) \|", table))))
    pool = {f"pool.{name}" for name in PACKAGES["pool"]} - {"pool.__init__"}
    assert {*LAYERS, *pool} - named == set()
