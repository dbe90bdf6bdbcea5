"""Graph passes, in the order they run: attention_forms → tracking → pipeline (decide) → rewrite."""
