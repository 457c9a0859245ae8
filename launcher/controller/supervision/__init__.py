"""The ranks' generations: starting them, following them, finding out why they ended, and the nodes that they run on."""
