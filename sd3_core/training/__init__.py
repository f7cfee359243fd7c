"""Teaching: what a network is taught, from which pictures, and how a run goes on."""
