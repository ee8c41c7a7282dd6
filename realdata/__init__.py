"""Data that people made, one file a source: pictures, what each is known to show, questions about it."""
