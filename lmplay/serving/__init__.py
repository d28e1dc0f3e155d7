"""Serve a model: continuous batching, Redis streams, and OpenAI's completions over HTTP."""
