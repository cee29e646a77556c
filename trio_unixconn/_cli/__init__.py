"""The commands of ``trio-unixconn``, which ``__main__`` puts together."""
