"""Answers for many people at once: continuous batching, OpenAI's protocol, one page."""
