"""Adapters of single layers: what they change, and how a layer in use follows."""
