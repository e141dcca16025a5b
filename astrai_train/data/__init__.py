"""Records to rows of tokens; re-exports nothing, so that `astrai-data` starts without torch."""
