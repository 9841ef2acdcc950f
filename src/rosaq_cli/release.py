"""The installed version, without importing the library."""

from importlib import metadata


def version() -> str:
    """Version of the installed distribution."""
    return metadata.version("rosaq")
