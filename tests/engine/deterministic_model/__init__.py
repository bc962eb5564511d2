"""A model whose stream says which row it is, its oracle, and traffic to drive it with."""
