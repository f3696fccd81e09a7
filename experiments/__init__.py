"""Scripts a person runs. Each has a --help worth reading."""
