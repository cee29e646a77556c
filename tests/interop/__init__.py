"""Tests against the real GLib: a process of its own with PyGObject is at the other end."""
