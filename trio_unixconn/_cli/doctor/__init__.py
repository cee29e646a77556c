"""The examination of ``trio-unixconn doctor``: what this kernel and Python offer."""
