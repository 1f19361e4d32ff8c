"""`python -m deploykit`."""

from deploykit.cli.main import main

if __name__ == "__main__":
    main()
