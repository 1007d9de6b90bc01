"""What happens to a model in hand: plan, apply, untie, merge, history, verify; and how it was built."""
