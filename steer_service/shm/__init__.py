"""Shared memory: segments, their owners and their budget.

segments   one segment: created, opened, mapped, unlinked
instances  which processes own segments, so that those of dead ones are removed
pool       segments ready for use, within a budget
limits     the limit of open files
"""
