"""Check the hooks of the task that the command line names, as ``distlenet.prove`` does first; print what fails."""

from distlenet.config.arguments import settings_parser
from distlenet.config.loading import load_config
from distlenet.distributed.context import init_distributed
from distlenet.prove.contract import Contract
from distlenet.tasks.registry import create_task, make_task

arguments = settings_parser("hooks_program", "Check hooks.").parse_intermixed_args()
config = load_config(arguments.config, arguments.overrides)
with init_distributed(config) as context:
    contract = Contract(config, create_task(make_task, config), context)
    contract.run()
print(len(contract.findings), "checks, failed:", [finding for finding in contract.findings if finding.cause])
