"""The version, in a file of its own so that the command line can show it without loading anything."""

__version__ = "0.1.0"
