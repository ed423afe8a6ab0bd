"""The tasks that a published model can be fine-tuned on, by the `kind` of the recipe.

    task.py             what the training run asks of a task (`Task`), and text-to-text tasks
    translation.py      text to text, scored by BLEU and chrF
    summarization.py    text to text, or picking sentences of the text
    ner.py              a label for each word
    qa.py               a span of the context
    matching.py         the sentence that was taken out of a text
    scores.py           the scores of all of them

A task is made of the examples of its files (finetune/examples). It cuts them into segments, which finetune/rows.py
packs into rows, and turns what a model answers into predictions and scores (finetune/evaluation).
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
