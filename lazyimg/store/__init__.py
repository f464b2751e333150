"""The chunk cache on disk: chunk files and the index that says what of them is present."""
