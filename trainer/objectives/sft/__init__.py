"""Objective `sft`: next-token prediction on an assistant's answers."""
