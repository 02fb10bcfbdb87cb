"""`python -m keepset` is the command `keepset`."""

from keepset.cli import main

main()
