"""Attacks, losses, schedules and the AutoAttack plan: tensors in, tensors out."""
