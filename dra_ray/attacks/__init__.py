"""Attacks and AutoAttack's plan: tensors in, tensors out."""
