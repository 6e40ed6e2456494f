"""What the user declares: rules from selectors to declarations, their files, and what they mean for one model."""
