"""The edge: generated stubs, and for each kind of word a pure `x_to_proto` and `x_from_proto` side by side."""
