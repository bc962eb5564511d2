"""`steer vectors`: steering vectors in the files that people have.

command  the command line
source   the file or folder that every action reads
inspect  prints what it holds
convert  writes it as another kind of file
sweep    measures what it does to the likelihood of texts
"""
