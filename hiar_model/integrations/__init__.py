"""HiAR inside the libraries of others; each is imported only with its module here."""
