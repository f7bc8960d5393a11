"""Records of what became of a model, and the views that render them."""
