"""The OpenAI REST API over a `Generator` and a `Text`: routes, request and response bodies."""
