"""`steer capture`: the hidden states of many prompts as a data set.

command       the command line
prompts       the file of prompts
endable_file  a pipe or terminal whose reader can be told to stop
lines_ahead   prompts read in a thread
windows       long texts cut to windows
long_texts    the tokens of long texts
run           prompts sent to a server, several at a time, and resumed where an earlier run ended
shards        rows written to shards
settings      the settings of a run in the words of the command line
"""
