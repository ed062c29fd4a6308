"""`python -m optim`: the one file of the namespace package itself."""

from optim.cli import command

command()
