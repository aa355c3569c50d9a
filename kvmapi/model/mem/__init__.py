"""Guest memory of the model: the backings of a guest page and who may see them."""
