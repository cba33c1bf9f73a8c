"""The built-in tasks: implementations of ``distlenet.task.Task``.

Offers ``registry.make_task``, which creates the task that the settings name, and ``image_classification`` with its
transform and its error analysis.
"""
