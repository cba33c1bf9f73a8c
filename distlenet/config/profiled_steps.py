"""The setting ``train.profile_steps``."""

import re

from distlenet.utils.errors import UserError


def profiled_steps(text: str | None) -> range:
    """Return the steps of a job that ``A:B`` names; None names none. Raise UserError for any other text."""
    if text is None:
        return range(0)
    match = re.fullmatch(r"([0-9]{1,15}):([0-9]{1,15})", text)
    steps = range(int(match[1]), int(match[2])) if match else range(0)
    if not steps:
        raise UserError(f"train.profile_steps={text}: expected A:B, A less than B; 10:15 are five steps, 10 to 14")
    return steps
