"""One module per kind of dataset: raw files -> list of records."""
