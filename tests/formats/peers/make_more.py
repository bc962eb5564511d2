"""Makes files beside this one with the code of more projects, one project at a time; see `recording.py`.

Each needs its project, which this repository's environment does not have. From the repository root, with transformers
5.19 and torch 2.13:

    pip install dialz==1.1.4            and  python -m tests.formats.peers.make_more dialz
    pip install eai-sparsify==1.3.3     and  python -m tests.formats.peers.make_more sparsify
    pip install lm-eval==0.4.13 eai-sparsify==1.3.3  and  python -m tests.formats.peers.make_more lm_eval
    pip install repe==0.1.4             and  python -m tests.formats.peers.make_more repe
    pip install sae-lens==6.54.12       and  python -m tests.formats.peers.make_more sae_lens
    pip install transformer-lens==4.3.0 and  python -m tests.formats.peers.make_more transformer_lens
    pip install dictionary-learning==0.1.0 and  python -m tests.formats.peers.make_more dictionary_learning
    pip install nnsight==0.8.1          and  python -m tests.formats.peers.make_more nnsight

All numbers in the files are random ones of this script or come from the random model. `nnsight.pt` has the outputs of
the layers at the last token of the prompt. Of sparse autoencoders,
`<folder>/decoder.npy` has the decoder as the project loads it, shape [features, width].
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.formats.peers.recording import HERE, PROMPT, SCALE, WIDTH, directions, record, saved_model

FEATURES = 24
FEATURE = 5


def dialz() -> None:
    from dialz import SteeringModel, SteeringVector

    SteeringVector(model_type="llama", directions=directions(0, 2, 3)).export_gguf(HERE / "dialz.gguf")
    steered = SteeringModel(str(HERE / "model"), [0, 2, 3])
    exact = saved_model()[0].state_dict()
    steered.model.float()  # it loads every model in float16
    for name, parameter in steered.model.named_parameters():
        parameter.data.copy_(exact[name.replace(".block", "")])

    @contextmanager
    def steers(model: Any, path: Path) -> Iterator[None]:
        steered.set_control(SteeringVector.import_gguf(path), SCALE)
        yield

    record("dialz.gguf", steered.model, saved_model()[1], steers)


def sparsify() -> None:
    from sparsify import SparseCoder, SparseCoderConfig

    torch.manual_seed(1)
    folder = HERE / "sparsify" / "layers.2"
    coder = SparseCoder(WIDTH, SparseCoderConfig(num_latents=FEATURES, k=4))
    torch.nn.init.normal_(coder.b_dec)
    coder.save_to_disk(folder)
    np.save(folder / "decoder.npy", SparseCoder.load_from_disk(folder).W_dec.detach().numpy())


def lm_eval() -> None:
    from lm_eval.models.hf_steered import SteeredModel, steer

    vectors = {layer: torch.from_numpy(vector) for layer, vector in directions(0, 1, 3, 9).items()}
    hooks = {
        "layers.0": {"action": "add", "steering_vector": vectors[0], "steering_coefficient": 1.5, "bias": None},
        "layers.1": {
            "action": "clamp", "steering_vector": vectors[1], "steering_coefficient": 2.0, "bias": vectors[9],
            "head_index": None,
        },
        "layers.3": {"action": "clamp", "steering_vector": vectors[3], "steering_coefficient": -1.0},
    }  # fmt: skip
    torch.save(hooks, HERE / "lm_eval.pt")

    columns = "loader,action,sparse_model,hookpoint,feature_index,steering_coefficient"
    table = HERE / "lm_eval.csv"
    table.write_text(f"{columns}\nsparsify,clamp,{HERE / 'sparsify'},layers.2,{FEATURE},3.0\n")
    torch.save(SteeredModel.derive_steer_config(str(table)), HERE / "lm_eval_table.pt")
    table.unlink()

    @contextmanager
    def steers(model: Any, path: Path) -> Iterator[None]:
        with steer(model, SteeredModel(str(HERE / "model"), str(path), device="cpu", dtype="float32").hook_to_steer):
            yield

    for name in ("lm_eval.pt", "lm_eval_table.pt"):
        record(name, *saved_model(), steers, scale=1.0)


def repe() -> None:
    from repe.rep_control_reading_vec import WrappedReadingVecModel
    from repe.rep_readers import ClusterMeanRepReader

    model, tokenizer = saved_model()
    layers = [-1, -2, -4]
    states = {layer: np.random.default_rng(-layer).normal(size=(8, WIDTH)).astype(np.float32) for layer in layers}
    reader = ClusterMeanRepReader()
    found = reader.get_rep_directions(model, tokenizer, states, layers, train_choices=np.array([0, 1] * 4))
    torch.save({layer: torch.from_numpy(direction) for layer, direction in found.items()}, HERE / "repe.pt")

    @contextmanager
    def steers(model: Any, path: Path) -> Iterator[None]:
        wrapped = WrappedReadingVecModel(model, tokenizer)
        wrapped.wrap_block(layers, "decoder_block")
        vectors = {layer: SCALE * vector[0] for layer, vector in torch.load(path).items()}
        wrapped.set_controller(layers, vectors)
        yield

    record("repe.pt", model, tokenizer, steers)


def sae_lens() -> None:
    from sae_lens import SAE, JumpReLUSAE, JumpReLUSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    torch.manual_seed(2)
    folder = HERE / "sae_lens"
    place = SAEMetadata(model_name="llama", hook_name="blocks.2.hook_resid_pre")
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=WIDTH, d_sae=FEATURES, metadata=place))
    for parameter in sae.parameters():
        torch.nn.init.normal_(parameter)
    sae.save_model(folder)
    np.save(folder / "decoder.npy", SAE.load_from_disk(folder).W_dec.detach().numpy())


def dictionary_learning() -> None:
    from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer
    from dictionary_learning.training import trainSAE

    torch.manual_seed(3)
    trainer = {
        "trainer": TopKTrainer, "activation_dim": WIDTH, "dict_size": FEATURES, "k": 4, "layer": 2, "lm_name": "llama",
        "device": "cpu", "submodule_name": "resid_post_layer_2", "warmup_steps": 1, "steps": 4,
    }  # fmt: skip
    data = (torch.randn(8, WIDTH) for _ in range(100))
    trainSAE(data, [trainer], steps=4, save_dir=str(HERE / "dictionary_learning"), device="cpu", log_steps=None,
             autocast_dtype=torch.float32)  # fmt: skip
    folder = HERE / "dictionary_learning" / "trainer_0"
    decoder = AutoEncoderTopK.from_pretrained(folder / "ae.pt").decoder.weight  # [width, features]
    np.save(folder / "decoder.npy", decoder.detach().numpy().T.copy())


def transformer_lens() -> None:
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers(str(HERE / "model"), dtype=torch.float32)
    tokenizer = saved_model()[1]
    _, happy = bridge.run_with_cache(tokenizer("music makes me happy", return_tensors="pt")["input_ids"])
    _, sad = bridge.run_with_cache(tokenizer("music makes me sad", return_tensors="pt")["input_ids"])
    names = ["blocks.0.hook_out", "blocks.2.hook_in", "blocks.3.hook_resid_post"]
    torch.save({name: (happy[name] - sad[name])[0, -1].clone() for name in names}, HERE / "transformer_lens.pt")

    @contextmanager
    def steers(model: Any, path: Path) -> Iterator[None]:
        vectors = torch.load(path)
        added = [(name, lambda value, hook, vector=vector: value + SCALE * vector) for name, vector in vectors.items()]
        with bridge.hooks(fwd_hooks=added):
            yield

    # A hook at hook_in acts inside of its block, before its first norm.
    takers = [*(block.ln1 for block in bridge.blocks[1:]), bridge.ln_final]
    record("transformer_lens.pt", bridge.original_model, tokenizer, steers, takers=takers)


def nnsight() -> None:
    from nnsight import LanguageModel

    model = LanguageModel(str(HERE / "model"), dispatch=True, dtype=torch.float32)
    ids = saved_model()[1](PROMPT, return_tensors="pt")["input_ids"]
    with model.trace(ids) as tracer:
        cache = tracer.cache(modules=list(model.model.layers)).save()
    paths = list(cache.keys())  # it is no mapping
    torch.save({path: cache[path].output[0, -1].clone() for path in paths}, HERE / "nnsight.pt")


if __name__ == "__main__":
    globals()[sys.argv[1]]()
