"""The tasks that a published model can be fine-tuned on, by the `kind` of the recipe (`TASKS`).

    task.py             what training asks of a task (`Task`), and what tasks from text to text share
    translation.py      text to text, scored by BLEU and chrF
    summarization.py    text to text, or picking sentences of the text, scored by ROUGE
    ner.py              a label for each word; tagging.py finds the token that carries it
    qa.py               a span of the context
    matching.py         which tokens of a context stand in its question
    scores.py           the scores of all of them; languages.py chooses their tokenization

A task is made of the examples of its files (finetune/examples). It cuts them into segments, which
finetune/rows.py packs into rows, and turns a model's output into predictions and scores
(finetune/evaluation).
"""

from collections.abc import Callable

from trifold.finetune.config import FinetuneConfig
from trifold.finetune.tasks.matching import Matching
from trifold.finetune.tasks.ner import open_ner
from trifold.finetune.tasks.qa import open_qa
from trifold.finetune.tasks.summarization import open_summarization
from trifold.finetune.tasks.task import Task, TextToText
from trifold.finetune.tasks.translation import Translation
from trifold.modeling.config import Family
from trifold.modeling.errors import UserError
from trifold.pretrain.data.tokenizer.tokenizer import Tokenizer

TASKS: dict[str, Callable[..., Task]] = {
    "translation": Translation,
    "summarization": open_summarization,
    "ner": open_ner,
    "qa": open_qa,
    "matching": Matching,
}


def open_tasks(config: FinetuneConfig, tokenizer: Tokenizer, family: Family) -> list[Task]:
    """The main task, whose dev score selects the checkpoint, then the tasks of `more`.

    Raises UserError naming file and line of an unusable example.
    """
    configs = (config.task, *config.more)
    tasks = [TASKS[task.kind](task, tokenizer, family, config.row_length) for task in configs]
    if len(tasks) > 1 and not all(isinstance(task, TextToText) for task in tasks):
        raise UserError(
            "`more` adds text-to-text tasks to a text-to-text task: other heads cannot be shared in one run."
        )
    return tasks
