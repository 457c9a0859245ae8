"""The probe: a process that answers prompts with the weights of any checkpoint of a run, while the run goes on without it."""
