"""`python -m fedsea` is the `fedsea` command."""

from fedsea.cli.main import main

if __name__ == "__main__":
    main()
