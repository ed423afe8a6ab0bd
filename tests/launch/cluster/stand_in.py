"""A small stand-in for training, which steps, records, saves, stops and can be killed, and its recipe."""

import json
import os
import signal
import threading
import time
from pathlib import Path

from trifold.launch.recipe.schema import PretrainRecipe
from trifold.pretrain.storage.jsonl import append_line, read_lines


def stand_in(refuse_at: int = -1, crash: bool = False, sleep_at: int = -1):
    """A training function with an all-reduce in each step and a checkpoint every 5. Made here, so that Ray
    ships it by value.
    """

    def train(recipe, rank_info):
        import json
        import time
        from pathlib import Path

        import torch
        import torch.distributed as dist

        from trifold.modeling.errors import UserError
        from trifold.pretrain.monitor.stop_request import StopRequest
        from trifold.pretrain.storage.jsonl import append_line

        if rank_info.init_method:
            dist.init_process_group(
                "gloo", rank_info.init_method, rank=rank_info.rank, world_size=rank_info.world
            )
        run = Path(recipe.run)
        request = StopRequest(run)
        saved = sorted(run.glob("checkpoints/*/commit.json"))
        first = json.loads(saved[-1].read_text())["step"] if saved else 0
        if rank_info.rank == 0:
            append_line(
                run / "events.jsonl",
                {"time": time.time(), "event": "started", "step": first, "world": rank_info.world},
            )
        for step in range(first + 1, recipe.steps + 1):
            rank_info.reporter.set_phase("pretending", step=step, rows=(step, step))
            time.sleep(0.05 if step != sleep_at or rank_info.rank == 0 else 1000)
            if step == refuse_at and rank_info.rank == 1:
                raise UserError("the disk is full: 0 bytes left")
            if crash and rank_info.rank == 1:
                raise RuntimeError("something broke")
            stop = torch.tensor([float(request.asked())])
            dist.all_reduce(stop)
            if rank_info.rank == 0:
                append_line(run / "metrics.jsonl", {"step": step, "loss": 1 / step, "place": str(rank_info)})
                if step % 5 == 0 or stop.item():
                    folder = run / "checkpoints" / f"step-{step:08d}-g0001"
                    folder.mkdir(parents=True, exist_ok=True)
                    (folder / "commit.json").write_text(json.dumps({"step": step}))
            if stop.item():
                if rank_info.rank == 0:
                    append_line(run / "events.jsonl", {"event": "stopped", "step": step})
                return
        if rank_info.rank == 0:
            append_line(run / "events.jsonl", {"event": "finished", "step": recipe.steps})

    return train


def recipe(run: Path, steps: int = 40, **cluster_keys: object) -> PretrainRecipe:
    return PretrainRecipe.model_validate_json(
        json.dumps(
            {
                "run": str(run),
                "model": {
                    "family": "decoder",
                    "vocab_size": 300,
                    "dim": 16,
                    "num_layers": 1,
                    "num_heads": 1,
                    "num_kv_heads": 1,
                }
                | {"head_dim": 16, "mlp_dim": 16, "max_positions": 16},
                "data": {"sources": [{"path": "x.txt"}], "heldout_fraction": 0.1, "row_length": 16},
                "objective": {"kind": "causal"},
                "optimizer": {"lr": 0.001},
                "steps": steps,
                "step_rows": 2,
                "micro_rows": 1,
                "cluster": {"workers": 2, **cluster_keys},
            }
        )
    )


def kill_when(run: Path, step: int, rank: int = 1) -> threading.Thread:
    """kill -9 the given rank once `step` was recorded; at most once."""

    def watch() -> None:
        while not any(record["step"] >= step for record in read_lines(run / "metrics.jsonl")):
            time.sleep(0.02)
        os.kill(json.loads((run / "workers" / f"rank-{rank:05d}.json").read_text())["pid"], signal.SIGKILL)
        append_line(run / "killed.jsonl", {"time": time.time()})

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def kinds(run: Path) -> list[str]:
    return [event["event"] for event in read_lines(run / "events.jsonl") if event["event"] != "placed"]
