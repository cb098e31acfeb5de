"""`gather`: exit waves, windows of an object times light. README.md gives the formula; `reference.py` is its plain definition."""
