"""What a model costs on hardware, from the same configuration and modules that run."""
