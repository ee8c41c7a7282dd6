"""The report, the README's generated parts, and data that other people published."""
