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
    Mutant(
        name="a name that is twice in one object of JSON keeps its last value",
        file="steer_service/formats/unique_json.py",
        old="        if len(found) < len(pairs):\n",
        new="        if False:\n",
        why="one of two vectors of a layer is dropped, and nothing says so",
        killed_by=tests_in("formats/test_unique_json.py", "test_every_file_of_json_is_read_in_this_way"),
    ),
    Mutant(
        name="an array that is twice in an archive keeps its last numbers",
        file="steer_service/formats/layouts/file_content.py",
        old="            if name in found:\n",
        new="            if False:\n",
        why="one of two vectors of a layer is dropped, and nothing says so",
        killed_by=tests_in(
            "formats/test_unique_json.py",
            "test_an_archive_with_an_array_twice_is_refused_and_the_array_is_named",
        ),
    ),
    Mutant(
        name="a shape that overflows is left to NumPy",
        file="steer_service/formats/layouts/file_content.py",
        old="    if any(length < 0 for length in shape) or math.prod(shape) * dtype.itemsize > size - file.tell():\n",
        new="    if False:\n",
        why="a damaged file ends in a warning of NumPy and its words",
        killed_by=tests_in("formats/layouts/test_file_content.py", "test_a_shape_that_its_file_cannot_hold_is_refused"),
    ),
    Mutant(
        name="a layer that is counted from the end is one off",
        file="steer_service/formats/layouts/layer_names.py",
        old="    return layer_count + number\n",
        new="    return layer_count + number - 1\n",
        why="the directions of RepE act one layer early",
        killed_by=tests_in(
            "formats/layouts/test_layer_names.py", "test_a_negative_layer_counts_from_the_last_one_of_the_model"
        ),
    ),
    Mutant(
        name="a bad file ends a command with 1 where it is found late",
        file="steer_service/cli/vectors/source.py",
        old="    except InvalidRequest as error:\n        raise UsageError(str(error)) from error\n",
        new="    except UsageError:\n        raise\n",
        why="scripts take a wrong command line for a failure that may pass",
        killed_by=tests_in("cli/test_vectors.py", "test_what_a_kind_cannot_hold_ends_with_2"),
    ),
)
