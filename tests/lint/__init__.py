"""Checks of the text of this project, run by ``nox -s lint``."""
