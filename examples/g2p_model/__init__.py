"""Two small models that pronounce English words: how they are trained and how good they are."""
