"""The demonstration of ``trio-unixconn demo``: one process hands things to two others."""
