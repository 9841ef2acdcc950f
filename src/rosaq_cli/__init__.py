"""The command line: a client of the library, apart from it so that `rosaq --help` need not load PyTorch."""
