"""`python -m fedsea` is the `fedsea` command."""

from fedsea.cli.main import main

main()
