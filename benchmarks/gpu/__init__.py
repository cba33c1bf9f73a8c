"""The questions of ``make gpu-report``, and what they share."""
