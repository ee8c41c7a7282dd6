"""Making datasets out of datasets, with the models that one has.

balance         how often each data set is seen; texts that only repeat others go
free_response   multiple choice becomes free response
difficulty      which questions a model solves sometimes: what RL can learn from, and a hard set
chains          a model's own right chains of thought, and their blend with direct answers

asking          what difficulty and chains share: many questions, over ranks, resumable
rows            what all of them write: our own format, pictures beside it
"""
