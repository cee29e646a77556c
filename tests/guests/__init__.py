"""Other kernels, other versions of Debian, and a real systemd: in guests, and in directories."""
