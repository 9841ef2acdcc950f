"""From weights to codes: the grid, and the searches that choose what is rounded."""
