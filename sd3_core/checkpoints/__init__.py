"""Files <-> networks: what a file holds, strictly read, and files written in the released layout."""
