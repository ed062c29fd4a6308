"""`python -m optim.cli`."""

from optim.cli import command

command()
