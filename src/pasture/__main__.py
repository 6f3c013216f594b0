"""`python -m pasture` is `pasture`."""

from pasture.cli.main import main

if __name__ == "__main__":
    main()
