"""Other projects' formats, as plain dicts and names."""
