"""From one stage to the next: the exam, samples of text, the checkpoint that is the stage's product, the border."""

from __future__ import annotations

from midwatch.protocol import StageBorder
from shards.common.errors import ShardError
from trainer.loop.evaluate import evaluate
from trainer.loop.text_samples import show_samples
from trainer.stage.training import Training
from trainer.synthetic import stage


def end_stage(training: Training, following: int | None = None) -> tuple[str | None, str | None]:
    """Ends the stage here and begins the next one, or the one of index `following`: its product, or why there is none.

    Left to the loop (`following` None) it gives (None, None) where evaluation was broken off, for the boundary to be looked at
    first. A product that cannot be saved pauses the run: later stages would rest on something that is nowhere. So does a next
    stage whose data cannot be opened.
    """
    if training.evaluated != training.mark and not training.stage.stage.makes and evaluate(training) and following is None:
        return None, None
    if training.sampled != training.mark and not training.stage.stage.makes and show_samples(training) and following is None:
        return None, None
    try:
        if training.stage.stage.makes:
            stage.finish(training)
        opened = training.open_next(following)
    except ShardError as error:
        training.hold_for_data(str(error))
        return None, str(error)
    at = training.progress
    product, problem = training.save_and_wait(ended=True, following=following)
    if problem is not None:
        if opened is not None:
            opened.close()
        text = (
            f'stage "{at.stage_name}" cannot end, its checkpoint failed: {problem} (make room and resume; it is then tried again)'
        )
        training.note("alarm", text)
        if not training.boundary.paused:
            training.boundary.pause()
        return None, problem
    training.link.send(
        StageBorder(stage=at.stage_name, event="end", step=at.step, stage_step=at.stage_step, lineage=at.lineage, product=product)
    )
    training.begin_next(product, opened)
    return product, None
