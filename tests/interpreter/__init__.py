"""A package, so that its files may bear the names of files in tests/, and find what stands there (budget, naive)."""
