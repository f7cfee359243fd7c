"""Files <-> networks: what a file holds, strictly read; files in the released layout."""
