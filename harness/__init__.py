"""Measured from outside: a model behind an address, the drawn world as files, two harnesses that others run.

remote       the questions of evaluate.py, asked through OpenAI's protocol
world_files  held-out scenes as files: VLMEvalKit's TSV, and JSON lines with pictures
adapter      a model of ours as a harness sees it: content parts in, text out
vlmevalkit   VLMEvalKit's own loop and scoring
lmms         lmms-eval's own loop and scoring, with the task in lmms_tasks/
"""
