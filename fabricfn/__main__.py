"""`python -m fabricfn`: the command line."""

from fabricfn.cli import main

main()
