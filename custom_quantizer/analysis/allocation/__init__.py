"""Which bits where: what each op loses at each width, and the best widths under a budget."""
