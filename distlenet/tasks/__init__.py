"""The built-in tasks: implementations of ``distlenet.task.Task``.

Offers ``image_classification`` (LeNet on grey images), its transform and its error analysis.
"""
