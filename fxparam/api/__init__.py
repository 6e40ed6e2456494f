"""What users call: transform, fold, restore, export."""
