"""Number formats and which of them each part of the model uses."""
