"""The training loop and the parts that only training needs.

Offers ``trainer.Trainer``, ``evaluation.evaluate``, ``dry_run.plan`` and the records of a run's starts (``starts``).
"""
