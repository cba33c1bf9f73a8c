"""``python -m distlenet.config``: print docs/settings.md, the reference of all settings."""

import sys

from distlenet.config.fields import FIELDS, GROUPS, to_yaml_value

INTRODUCTION = """# Settings

<!-- Generated from distlenet/config/schema.py by: python -m distlenet.config > docs/settings.md -->

Training, evaluation, preflight and `python -m distlenet.data` read `[--config FILE]... [key=value]...`: first the
files, then the pairs; the last value wins.
A pair may begin with two hyphens, such as `--train.epochs=3`. Keys with * change the result: they name the run,
and a checkpoint made with other values of them is not resumed. RUN is the directory of the run, in `run.dir`.
"""


def settings_page() -> str:
    """Return the page, with one table for each group of settings."""
    lines = [INTRODUCTION]
    for group in ("", *GROUPS):
        lines += [f"## {group}\n\n{GROUPS[group].__doc__}\n"] if group else ["## general\n\nThe run as a whole.\n"]
        lines += ["| key | default | accepted values | meaning |", "|---|---|---|---|"]
        for key, field in FIELDS.items():
            if key.rpartition(".")[0] == group:
                star, default = " *" if field.result else "", to_yaml_value(field.default)
                lines.append(f"| `{key}`{star} | `{default}` | {field.describe()} | {field.help} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(settings_page())
