"""`python -m saesteer` is the command line."""

from saesteer.cli.main import entry

if __name__ == "__main__":
    entry()
