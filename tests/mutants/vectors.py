"""Mutants of how files of vectors are read: one layer off, or an operation that is another."""

from tests.mutants.mutant import Mutant, tests_in

ARRAYS = "steer_service/formats/layouts/array_layouts.py"

VECTORS = (
    Mutant(
        name="rows by layer begin with the embeddings unless they are said not to",
        file=ARRAYS,
        old="    order = RowOrder.AFTER_LAYER if rows == count else RowOrder.EMBEDDINGS_FIRST\n",
        new="    order = RowOrder.EMBEDDINGS_FIRST\n",
        why="a model is steered with the vectors of the next layer, and nothing says so",
        killed_by=tests_in(
            "formats/layouts/test_array_layouts.py", "test_30_rows_of_a_30_layer_model_are_after_their_own_layer"
        ),
    ),
    Mutant(
        name="rows by layer are read although nothing says their order",
        file=ARRAYS,
        old="    if count is None:\n        raise InvalidRequest(",
        new="    if count is None:\n        return RowOrder.AFTER_LAYER, ''\n        raise InvalidRequest(",
        why="a file with the embeddings first is read one layer off",
        killed_by=tests_in(
            "formats/layouts/test_array_layouts.py",
            "test_30_rows_without_a_model_are_refused_until_their_order_is_said",
        ),
    ),
    Mutant(
        name="the layer of refusal_direction is taken for an output",
        file=ARRAYS,
        old="    return int(layer) - 1\n",
        new="    return int(layer)\n",
        why="its direction acts one layer late",
        killed_by=tests_in(
            "formats/layouts/test_array_layouts.py", "test_the_layer_of_refusal_direction_is_the_input_of_its_block"
        ),
    ),
    Mutant(
        name="hook_resid_pre is taken for hook_resid_post",
        file="steer_service/formats/layouts/layer_names.py",
        old='"hook_resid_pre": -1',
        new='"hook_resid_pre": 0',
        why="a vector of TransformerLens acts one layer late",
        killed_by=tests_in("formats/layouts/test_layer_names.py", "test_a_key_names_its_layer"),
    ),
    Mutant(
        name="a name with two layers means the first",
        file="steer_service/formats/layouts/layer_names.py",
        old="    if len(layers) > 1 or any(",
        new="    if any(",
        why="a vector acts at a layer that nobody said",
        killed_by=tests_in("formats/layouts/test_layer_names.py", "test_a_name_that_may_mean_another_layer_is_refused"),
    ),
    Mutant(
        name="a cap of assistant-axis bounds from below",
        file="steer_service/formats/layouts/assistant_axis.py",
        old='max=number(cap, "cap")',
        new='min=number(cap, "cap")',
        why="what is to be limited is made larger",
        killed_by=tests_in("formats/layouts/test_assistant_axis.py", "test_the_caps_do_what_the_project_does"),
    ),
    Mutant(
        name="vectors of another hidden size than the model's are read",
        file="steer_service/formats/layouts/open_file.py",
        old="if size is not None and vector.size != size:",
        new="if False:",
        why="the server refuses the request later, without the name of the file",
        killed_by=tests_in(
            "formats/layouts/test_array_layouts.py",
            "test_a_vector_that_does_not_fit_the_model_is_refused_with_both_numbers",
        ),
    ),
)
