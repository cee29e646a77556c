"""Every block of code in the README and the documentation is run, or checked."""
