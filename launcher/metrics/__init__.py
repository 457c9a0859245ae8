"""The metrics of a run: durable chunks, and the index that answers charts from them at any length."""
