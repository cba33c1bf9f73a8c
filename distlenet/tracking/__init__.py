"""Log the numbers of a run to the console, the run directory, W&B, MLflow, TensorBoard and Prometheus.

The trainer logs records to a ``Tracker`` (``base``) on rank 0; ``history`` also reads them back for reports. W&B,
MLflow, TensorBoard and Prometheus are fed by a separate process, which ``sidecar`` starts.
"""
