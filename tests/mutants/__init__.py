"""Deliberate faults in the guards of this project, each with the tests that must fail for it.

table     the faults
runner    puts a fault into a copy of the tree and runs its tests
__main__  `python -m tests.mutants`: all of them, or those with a part of the name
"""
