"""The nodes view: map, table and the page of one node."""
