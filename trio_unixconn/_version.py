"""Which version of the library this is. The rule of this file: the number stands here only."""

__version__ = "0.1.0"
