"""sentence-transformers opens a published encoder as it is: the mean of its last hidden states is ours."""

from pathlib import Path

import pytest
import torch

from tests.published import tokenizer
from tests.runtimes.folders import LINES, write_random
from trifold.modeling.batch import Batch

sentence_transformers = pytest.importorskip("sentence_transformers", reason="pip install 'trifold[runtimes]'")
pytestmark = pytest.mark.proof


@pytest.mark.parametrize(
    "name", ["modernbert", "modernbert, biases, own head", "modernbert, all global, five heads"]
)
@torch.no_grad()
def test_vectors_are_the_means_of_our_hidden_states(name: str, tmp_path: Path) -> None:
    model = write_random(tmp_path / "encoder", name)
    theirs = sentence_transformers.SentenceTransformer(str(tmp_path / "encoder"), device="cpu").encode(
        LINES, convert_to_tensor=True
    )
    for line, vector in zip(LINES, theirs, strict=True):
        before, after = tokenizer().special_prefix_suffix("encoder")
        tokens = torch.tensor([[*before, *tokenizer().encode_batch([line])[0].tolist(), *after]])
        ours = model.hidden(Batch(tokens, torch.ones_like(tokens), tokens))[0].mean(0)
        assert (ours - vector).abs().max() <= 1e-5 and ours.abs().max() > 0.1
