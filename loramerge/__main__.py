"""`python -m loramerge` and the `loramerge` command."""

from loramerge.cli import main

if __name__ == "__main__":
    main()
