"""A run's report: read its folder, draw its charts, write one page."""
