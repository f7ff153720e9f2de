"""What a step takes on devices that you do not have yet."""
