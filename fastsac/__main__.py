"""`python -m fastsac` is `fastsac`."""

from fastsac.cli import main

main()
