"""What to do: the recipe's schema, its files, and the error that explains itself. No torch here."""
