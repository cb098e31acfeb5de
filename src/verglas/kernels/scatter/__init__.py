"""`scatter`: exit waves spread over object and light. README.md gives the formula; `reference.py` is its plain definition."""
