"""The name by which a public class or function is known: that of the module that exports it.

Source: trio's ``fixup_module_metadata``, for the idea
"""

from types import FunctionType
from typing import Any, Final

PACKAGE: Final = __name__.partition(".")[0]


def export(module: dict[str, Any]) -> None:
    """Make the classes and functions in ``__all__`` name a public module as theirs.

    A repr, a traceback or a pickle then says ``trio_unixconn.UnixConnection``, which can be
    imported, and not the file that defines it. If two modules export it, it is known by the name
    of the one nearer to the root: the errors are those of the package.

    Args:
      module: ``globals()`` of the module that calls this, after its imports.
    """
    name: str = module["__name__"]
    for key in module["__all__"]:
        value = module[key]
        if isinstance(value, type | FunctionType):
            defined_in = value.__module__
            if defined_in.startswith(f"{PACKAGE}.") and len(name) < len(defined_in):
                value.__module__ = name
