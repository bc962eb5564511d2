"""`steer capture`: the hidden states of many prompts as a data set.

command  the command line
prompts  the file of prompts
run      prompts sent to a server, several at a time, and resumed where an earlier run ended
shards   rows written to shards
"""
