"""`trifold bench generate`: new tokens per second, ours next to the Hugging Face class with the same weights:
batch 1 and 32, greedy and beam search.
"""

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from trifold.launch.bench.contenders import SPECIAL, stock_class
from trifold.launch.bench.report import Row, machine, show
from trifold.launch.recipe.schema import PretrainRecipe
from trifold.launch.terminal import Terminal
from trifold.modeling.config import ModelConfig
from trifold.modeling.errors import UserError
from trifold.modeling.generation.config import Generation
from trifold.modeling.generation.generate import generate
from trifold.modeling.huggingface import export
from trifold.modeling.transformer import build
from trifold.pretrain.distributed import RankInfo
from trifold.pretrain.initial_model import load_initial_model

BATCHES, BEAMS, PROMPT = (1, 32), (1, 4), 32


def bench(
    config: PretrainRecipe, rank_info: RankInfo, console: Terminal, *, new: int, rounds: int, out: Path | None
) -> None:
    """Measure and show. Texts have exactly `new` tokens: their end is forbidden until then."""
    model_config = load_initial_model(config.model, Path(config.run))[0]
    if model_config.family == "encoder":
        raise UserError(
            f"{config.run} trains an encoder, which writes no text: take a decoder or an encoder-decoder"
        )
    torch.set_num_threads(rank_info.threads)
    new = min(new, model_config.max_positions // 2)
    rows = [
        row
        for batch in BATCHES
        for beams in BEAMS
        for row in measure(model_config, rank_info, batch, beams, new, rounds)
    ]
    show(console, f"{config.run}: generation\n{machine(rank_info.device, rank_info.threads)}", rows, out)


def measure(
    model_config: ModelConfig, rank_info: RankInfo, batch: int, beams: int, new: int, rounds: int
) -> list[Row]:
    """Both in turn, the same prompts and weights."""
    ours = build(model_config, 0)
    hf, state = export(model_config, ours.state_dict(), SPECIAL)
    theirs = stock_class(hf["architectures"][0], hf)
    theirs.load_state_dict(state, strict=False)  # tied weights have one name in `state`
    ours, theirs = ours.to(rank_info.device), theirs.to(rank_info.device).eval()
    prompts = torch.randint(
        105, model_config.vocab_size, (batch, PROMPT), generator=torch.Generator().manual_seed(0)
    )
    how = Generation(max_new=new, min_new=new, beams=beams)
    given = prompts.to(rank_info.device)

    def stock() -> None:
        limits = {
            "max_new_tokens": new,
            "min_new_tokens": new,
            "num_beams": beams,
            "do_sample": False,
            "use_cache": True,
        }
        with torch.no_grad():
            theirs.generate(given, attention_mask=torch.ones_like(given), **limits)  # type: ignore[operator]

    def mine() -> None:
        generate(ours, prompts.tolist(), how, bos=SPECIAL["bos"], eos=SPECIAL["eos"], pad=SPECIAL["pad"])

    seconds = [[_timed(work, rank_info) for work in (mine, stock)] for _ in range(rounds + 1)][1:]
    fast, slow = (median(pair[i][0] for pair in seconds) for i in (0, 1))
    cpu = median(pair[1][1] for pair in seconds) / median(pair[0][1] for pair in seconds)
    name = f"batch {batch}, " + ("greedy" if beams == 1 else f"{beams} beams")
    return [
        {
            "": f"{name}: Trifold",
            "tokens/s": batch * new / fast,
            "ours, times": slow / fast,
            "by CPU time": cpu,
        },
        {"": f"{name}: {hf['architectures'][0]}", "tokens/s": batch * new / slow},
    ]


def _timed(work: Callable[[], None], rank_info: RankInfo) -> tuple[float, float]:
    began, cpu = time.perf_counter(), time.process_time()
    work()
    if rank_info.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began, time.process_time() - cpu
