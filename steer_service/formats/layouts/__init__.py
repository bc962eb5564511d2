"""Layouts of steering vectors in files of other projects, recognised by their content.

file_content   what a file holds, whatever its container; nothing in it is executed
stored_array   arrays that are read when they are needed
read_options   what a user says of a file that its content does not say
open_file      a file with its content and options, and the refusals that name them
layer_names    the layer that a key or the name of a file means
array_layouts  one vector, rows by layer, and rows by position and layer
dict_layouts   vectors under the names of layers, and dictionaries with one known entry
assistant_axis the dictionaries of assistant-axis, and its capping configurations
lm_eval        the hook points of lm-eval's steered models
sae_decoder    one feature of a sparse autoencoder
recognise      tries the layouts one after the other
"""
