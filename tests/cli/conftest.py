"""Servers around the fake backend, as the tests of the client have them."""

from tests.client.conftest import client, dead_address, serve, server, short_folder  # noqa: F401  (fixtures)
