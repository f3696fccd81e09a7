"""An engine behind HTTP, in the words of the OpenAI API. `app` has the endpoints, `run` listens."""
