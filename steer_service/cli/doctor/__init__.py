"""`steer doctor`: checks the environment of a server, and says what to do.

command         the arguments, the list of checks, and how they are printed
findings        what a check found; a check that fails itself is a finding too
child           imports in a process of their own, which may be slow or crash
packages        Python, vLLM, and packages whose import fails
processor       its cores, which vLLM lists with lscpu
device          GPUs, and whether torch is built for what is there
shared_memory   the directory of captures and of vLLM's own shared memory
folders         folders that must be writable
ports           the addresses to listen on
host_memory     memory, with the limit of the container, and what the model needs
open_files      the limit of open files
served_model    the model's folder, and whether its family is verified
settings        environment variables, certificates and tokens
"""
