"""Makes the files beside this one: vectors as other projects write them, and what these projects do with them.

Needs repeng and steering-vectors, which this repository's environment does not have; from the repository root, in one
of its own:

    pip install repeng==0.4.0 steering-vectors==0.12.2 -e '.[huggingface]'
    python -m tests.formats.peers.make

The files were made with these two, transformers 4.57.6, torch 2.13.0 and numpy 1.26.4, the newest transformers and
numpy that they allow. `recording.py` describes what is beside each file. `make_more.py` makes the files of other
projects.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from repeng import ControlModel, ControlVector, DatasetEntry
from steering_vectors import SteeringVector, train_steering_vector
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from steer_service.formats.vector_files import write_vectors
from tests.formats.peers.recording import HERE, LAYERS, SCALE, WIDTH, directions, record

THINGS = ("music", "rain", "tea", "snow", "work", "cats", "trains", "games")
PAIRS = [(f"{thing} makes me happy", f"{thing} makes me sad") for thing in THINGS]
WORDS = ("<pad>", *THINGS, "makes", "me", "happy", "sad", "and")
VOCABULARY = 32


def main() -> None:
    model, tokenizer = make_model()
    repeng = ControlVector.train(model, tokenizer, [DatasetEntry(*pair) for pair in PAIRS], hidden_layers=[0, 2, 3])
    repeng.export_gguf(HERE / "repeng.gguf")
    record("repeng.gguf", model, tokenizer, repeng_steers)

    trained = train_steering_vector(model, tokenizer, PAIRS, layers=[0, 2, 3])
    torch.save(trained, HERE / "steering_vectors.pt")  # it has no call of its own for this
    record("steering_vectors.pt", model, tokenizer, steering_vectors_steers)

    write_vectors(HERE / "for_repeng.gguf", directions(1, 3), kind="gguf", model_hint="llama")
    record("for_repeng.gguf", model, tokenizer, repeng_steers)

    write_vectors(HERE / "for_steering_vectors.pt", directions(0, 1, 3), kind="steering-vectors")
    record("for_steering_vectors.pt", model, tokenizer, steering_vectors_steers)


def make_model() -> tuple[Any, Any]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        initializer_range=0.3,  # large enough that no greedy choice hangs on rounding
    )
    model = LlamaForCausalLM(config).eval()
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<pad>", model_input_names=["input_ids", "attention_mask"]
    )
    model.save_pretrained(HERE / "model")
    tokenizer.save_pretrained(HERE / "model")
    return model, tokenizer


@contextmanager
def repeng_steers(model: Any, path: Path) -> Iterator[None]:
    vector = ControlVector.import_gguf(path)
    controlled = ControlModel(model, sorted(vector.directions))
    controlled.set_control(vector, SCALE)
    try:
        yield
    finally:
        controlled.unwrap()


@contextmanager
def steering_vectors_steers(model: Any, path: Path) -> Iterator[None]:
    found = torch.load(path, weights_only=False)
    vector = found if isinstance(found, SteeringVector) else SteeringVector(**found)
    handle = vector.patch_activations(model, multiplier=SCALE)
    try:
        yield
    finally:
        handle.remove()


if __name__ == "__main__":
    main()
