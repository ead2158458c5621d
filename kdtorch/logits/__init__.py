"""What the student says: losses between logits."""
