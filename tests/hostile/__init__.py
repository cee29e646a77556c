"""Tests against peers that mean harm: random messages, in C and in Python."""
