"""What was measured, as a page to look at. Every figure on it is one of the JSON that lies beside it."""

SCHEMA = 2  # of the JSON: see docs/report.schema.json
PAGE = "compress_report.html"
