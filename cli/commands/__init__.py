"""The commands, a module for each panel of `optim --help`."""
