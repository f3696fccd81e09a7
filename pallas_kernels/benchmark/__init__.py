"""Cases for every kernel, whether it is right, how long it takes, and what else could have done the same."""
