"""The examination behind ``trio-unixconn doctor``: what this kernel and Python offer."""
