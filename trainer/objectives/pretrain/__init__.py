"""Objective `pretrain`: next-token prediction on text."""
