"""`python -m rosaq`: the command line, for launchers that start a module."""

from rosaq_cli.app import main

if __name__ == "__main__":
    main()
