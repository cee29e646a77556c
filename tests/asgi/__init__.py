"""ASGI applications in workers: what they are called with, what clients get, and invalid input."""
