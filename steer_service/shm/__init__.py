"""Shared-memory segments, the processes that own them, and their budget.

segments   one segment: created, opened, mapped and unlinked; the directory of segments and its permissions
instances  lock files that name the owner of a segment, so that segments of dead processes are removed
pool       creates segments within a byte budget for all clients and for each
limits     raises the limit of open files
message_rings  room in /dev/shm for the messages between vLLM's processes
"""
