"""``trio-unixconn serve``: a server whose connections are handled by worker processes."""
