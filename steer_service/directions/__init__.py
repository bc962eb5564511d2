"""Finding directions in captures of any backend, and judging them.

contrast    pairs of prompts that differ in what a direction should mean
directions  difference of means, PCA and a logistic probe, layer by layer
targets     texts whose likelihood is measured or trained for
training    training by gradients on a transformers model
sweep       the effect of a direction at several scales
report      tables and plots
"""
