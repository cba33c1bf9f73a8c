"""The environment variables of W&B that are settings of a run."""

from collections.abc import Mapping
from dataclasses import replace

from distlenet.config.schema import Config


def with_wandb_variables(config: Config, environ: Mapping[str, str]) -> Config:
    """Return the settings with the project and the entity of W&B's variables, if no setting names them.

    They are saved with the run: a replay, which may not have the variables, then finds the same W&B run.
    """
    project = config.wandb.project or environ.get("WANDB_PROJECT") or "distlenet"
    entity = config.wandb.entity or environ.get("WANDB_ENTITY") or None
    return replace(config, wandb=replace(config.wandb, project=project, entity=entity))
