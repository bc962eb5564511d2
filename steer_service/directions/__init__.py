"""Finds directions in captures of any backend and evaluates them.

contrast    pairs of prompts that differ in the property that a direction represents
rows        rows that represent prompts, captured on any backend
directions  difference of means, PCA and a logistic probe, layer by layer
scores      how well directions separate rows that they were not found in
targets     texts whose likelihood is measured or trained for
training    training by gradients on a transformers model
sweep       the effect of a direction at several scales
report      tables and plots
"""
