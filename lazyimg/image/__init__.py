"""One image as guests see it: what is present is read, what is absent is fetched."""
