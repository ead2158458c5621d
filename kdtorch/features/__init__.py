"""What the student sees: losses between features."""
