"""The evidence: win rates, the reward model's card, ROUGE-L, figures, and the report."""
