"""The demonstration behind ``trio-unixconn demo``: one process hands things to two others."""
